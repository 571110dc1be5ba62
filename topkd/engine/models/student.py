"""The student: a Hugging Face causal LM, its device, and logits at only the rows that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from topkd.engine.config.learner import LoRAConfig
from topkd.engine.models.lora import has_adapter, head_rows, head_weights, unwrap_adapter, with_adapter
from topkd.engine.models.tokenizer import check_there, describe_load_failure, quote_first_line
from topkd.topk.errors import ConfigError
from topkd.topk.fused import topk_logprobs
from topkd.topk.types import Int32

Device = Literal["auto", "cuda", "mps", "cpu"]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Autocast of a forward pass: to which dtype (None: off), and whether it includes the output head."""

    dtype: torch.dtype | None = None
    head: bool = False


FULL = Precision()


@dataclass(frozen=True, slots=True)
class Student:
    """A causal LM in two parts: ``backbone`` computes hidden states, ``head`` turns chosen rows into logits.

    The model stays in eval mode: with dropout the trained policy would not be the policy that was sampled.
    """

    model: nn.Module
    backbone: nn.Module
    head: nn.Module
    device: torch.device

    @classmethod
    def wrap(cls, model: nn.Module, device: Device = "auto") -> Student:
        """Wrap a loaded Hugging Face causal LM, with or without a peft adapter, and move it to ``device``.

        ``device="auto"`` is cuda, then mps, then cpu.
        """
        inner = unwrap_adapter(model)
        head = getattr(inner, "get_output_embeddings", lambda: None)()
        backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or "model", None)
        if head is None or backbone is None:
            raise ConfigError(
                "the student is not a causal language model with a separate output head",
                got=type(model).__name__,
                hint="load it with transformers.AutoModelForCausalLM",
            )
        target = pick_device(device)
        model.to(target).eval()
        student = cls(model, backbone, head, target)
        student._check_head()
        return student

    @classmethod
    def load(
        cls,
        path: str,
        device: Device = "auto",
        dtype: DType = "float32",
        *,
        lora: LoRAConfig | None = None,
        seed: int = 0,
    ) -> Student:
        """Load a model folder or hub id, its weights in ``dtype`` (use float32 if memory allows).

        With ``lora`` only a new adapter trains; the same seed gives the same adapter.
        """
        model = load_causal_lm(path, dtype)
        return cls.wrap(model if lora is None else with_adapter(model, lora, seed), device)

    def logit_rows(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> Tensor:
        """Compute float32 logits [N, V] only at the flat positions ``rows`` of a right-padded batch [B, T]."""
        logits: Tensor = self.head(_compute_hidden(self.backbone, input_ids, attention_mask, rows))
        return logits.float()

    def token_logprobs(
        self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, ids: Tensor, precision: Precision = FULL
    ) -> Tensor:
        """Compute exact log s at ``ids`` [N, M] (-1 pads give -inf), differentiable float32, without N x V logits."""
        return split_logprobs(self.backbone, self.head, input_ids, attention_mask, rows, ids, precision)

    def known(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Convert token ids to int64; refuse ids that are not integers, or not in the vocabulary.

        Unchecked, such an id would be an index error, or on a GPU end the process; -1 would return the last id's
        logprob.
        """
        array = np.asarray(ids)
        if array.size and array.dtype.kind not in "iu":
            raise ConfigError("token ids must be integers", got=array.dtype)
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            raise ConfigError(
                "a token id lies outside the model's vocabulary", got=f"{array.min()}..{array.max()}",
                expected=f"0..{self.vocab_size - 1}", hint="are these another tokenizer's ids?",
            )  # fmt: skip
        return array.astype(np.int64)

    @property
    def vocab_size(self) -> int:
        """The number of rows of the output head (padding included)."""
        return head_rows(self.head)

    @property
    def lora(self) -> bool:
        """Whether an adapter trains instead of the model itself."""
        return has_adapter(self.model)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuse a model that changes its logits after the head (soft-capping or scaling)."""
        ids = torch.arange(1, 5, device=self.device)[None] % self.vocab_size
        whole = self.model(input_ids=ids).logits.float()
        rows = self.logit_rows(ids, torch.ones_like(ids), torch.arange(4, device=self.device))
        if not torch.allclose(whole[0], rows, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                "this architecture changes its logits after the output head (soft-capping or scaling)",
                got=type(self.model).__name__,
                hint="training would use wrong probabilities; use another student",
            )


def split_logprobs(  # noqa: PLR0917
    backbone: nn.Module,
    head: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    rows: Tensor,
    ids: Tensor,
    precision: Precision = FULL,
) -> Tensor:
    """Compute ``Student.token_logprobs`` with any backbone and head."""
    kind = input_ids.device.type
    with torch.autocast(kind, dtype=precision.dtype or torch.bfloat16, enabled=precision.dtype is not None):
        hidden = _compute_hidden(backbone, input_ids, attention_mask, rows)
        weight, bias = head_weights(head)
        if precision.head:
            return topk_logprobs(hidden, weight, ids, bias=bias)[0]
    with torch.autocast(kind, enabled=False):
        return topk_logprobs(hidden.to(weight.dtype), weight, ids, bias=bias)[0]


def _compute_hidden(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> Tensor:
    hidden: Tensor = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[rows]


def pad_sequences(sequences: Sequence[Int32], device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad token ids to one width; return ids and attention mask, int64 [B, T] each."""
    width = max(sequence.size for sequence in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    attention = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        part = slice(width - sequence.size, None) if left else slice(sequence.size)
        ids[row, part], attention[row, part] = sequence, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(attention).to(device)


def pick_device(device: Device) -> torch.device:
    """Pick a device: ``auto`` is cuda, then mps, then cpu; refuse one that is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[device]:
        raise ConfigError(
            f"device {device} is not available",
            expected=f"one of {[name for name, there in available.items() if there]}",
            hint='use device = "auto"',
        )
    return torch.device(device)


def load_causal_lm(path: str, dtype: DType = "float32") -> Any:
    """Load a Hugging Face causal LM from a folder or a hub id; raise ConfigError on any failure."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # its progress bars would break ours

    from safetensors import SafetensorError

    check_there(path)
    try:
        model, account = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            describe_load_failure(path, "a causal language model"), got=quote_first_line(error)
        ) from error
    if missing := sorted(account["missing_keys"]):
        raise ConfigError(  # transformers would use random weights instead
            describe_load_failure(path, "a causal language model"),
            got=f"no weights for {missing[0]} ({len(missing)} in all)",
        )
    return model

"""A Hugging Face causal LM split into layers and output head, and its LoRA adapters, verified against their files."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topkd.serve.model.loading import silence_loading
from topkd.topk.errors import ConfigError

# At most this many float32 logits exist at once (64 MiB); a whole prompt of a large vocabulary would be gigabytes.
CHUNK_ELEMENTS = 16 * 2**20
_LORA_PREFIX = "base_model.model."


class Backbone:
    """Runs the layers and the output head separately. Used by one thread only.

    Attributes:
        vocab: Width of the logits (may be more than the tokenizer's size).
        mixes_lengths: Whether every layer is plain attention over a growing cache, so that sequences of different
            lengths may share one padded batch while they generate.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        head = model.get_output_embeddings()
        base = getattr(model, model.base_model_prefix or "", None)
        if head is None or base is None:
            raise ConfigError(
                "the model has no separate output head",
                where=type(model).__name__,
                expected="a causal LM with get_output_embeddings() and a base model",
                hint="serve it with vLLM instead",
            )
        self.vocab = int(model.config.get_text_config().vocab_size)
        # The argument's name since transformers 5.24; before, and in models that bring their own code, it is the other.
        self._cache_name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
        self._scale = self._find_scale()
        self.mixes_lengths = self._plain_attention()
        self._adapter: str | None = None
        self._adapters: set[str] = set()

    def hidden(self, ids: Tensor, *, cache: Any = None, **options: Any) -> Tensor:
        """Compute [B, T, H] states after the last norm, of rows padded on the right.

        ``cache`` is read and grows; without one nothing is kept.
        """
        base = getattr(self.model, self.model.base_model_prefix)
        if cache is not None:
            options[self._cache_name] = cache
        out = base(input_ids=ids, use_cache=cache is not None, **options)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Compute float32 [N, V] logits exactly as the model's own forward does."""
        raw = self.model.get_output_embeddings()(hidden_NH)
        return self._scale(raw).float()

    def chunks(self, rows: int) -> list[slice]:
        """Split ``rows`` into slices that keep a chunk of logits below the memory bound."""
        step = max(1, CHUNK_ELEMENTS // self.vocab)
        return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]

    def new_cache(self) -> Any:
        """Make an empty key-value cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def use_adapter(self, name: str | None) -> None:
        """Switch to a loaded adapter, or to the base model."""
        if name == self._adapter or not self._adapters:
            return
        _switch_lora(self.model, name)
        self._adapter = name

    def load_adapter(self, name: str, path: str) -> None:
        """Load a PEFT LoRA folder under ``name``, replacing what had that name; the base stays active."""
        if name in self._adapters:
            self.unload_adapter(name)
        self._adapters.add(name)
        self._adapter = name  # loading activates it
        try:
            _load_lora(self.model, name, path)
        except BaseException:
            self.unload_adapter(name)
            raise
        self.use_adapter(None)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; the base model is active afterwards."""
        self.use_adapter(None)
        self._adapters.discard(name)
        _unload_lora(self.model, name)

    def _plain_attention(self) -> bool:
        from transformers.cache_utils import DynamicLayer

        cache = self.new_cache()
        with torch.inference_mode():
            self.hidden(torch.zeros(1, 2, dtype=torch.long, device=self.device), cache=cache)
        return all(type(layer) is DynamicLayer for layer in cache.layers)

    def _find_scale(self) -> Callable[[Tensor], Tensor]:
        """Find by trial what the model does to its logits after the head (soft caps, scales)."""
        config = self.model.config.get_text_config()
        cap, factor, divisor = (
            getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        )
        forms: list[Callable[[Tensor], Tensor]] = [lambda x: x]
        if cap:
            forms.append(lambda x: torch.tanh(x / cap) * cap)
        if factor:
            forms.append(lambda x: x * factor)
        if divisor:
            forms.append(lambda x: x / divisor)
        probe = torch.arange(1, 9, device=self.device)[None] % self.vocab
        with torch.inference_mode():
            want = self.model(input_ids=probe, use_cache=False).logits[0].float()
            raw = self.model.get_output_embeddings()(self.hidden(probe)[0])
            for form in forms:
                got = form(raw).float()
                if got.shape == want.shape and torch.allclose(got, want, rtol=1e-3, atol=1e-3, equal_nan=True):
                    return form
        raise ConfigError(
            "the logits of the output head are not those of the model's forward pass",
            where=type(self.model).__name__,
            hint="this architecture changes its logits in a way this server does not know: serve it with vLLM instead",
        )


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Pad rows on the right to int64 [B, T]; no real token attends to the padding."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], dtype=torch.long, device=device)


def _load_lora(model: Any, name: str, path: str) -> None:
    """Load the folder at ``path`` as adapter ``name`` and make it active.

    Raises:
        ConfigError: The model's tensors are not the folder's afterwards, or another adapter's have changed.
    """
    others = {key: value.clone() for key, value in _lora_tensors(model).items()}
    with silence_loading(), warnings.catch_warnings():  # several adapters side by side are what a server is for
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        model.load_adapter(path, adapter_name=_lora_key(name))
    model.eval()
    _verify_lora(model, _lora_key(name), path, others)


def _unload_lora(model: Any, name: str) -> None:
    """Remove an adapter, if it is there."""
    if _lora_key(name) in getattr(model, "peft_config", {}):
        model.delete_adapter(_lora_key(name))


def _switch_lora(model: Any, name: str | None) -> None:
    """Make a loaded adapter active, or none."""
    if name is not None:
        model.enable_adapters()
        model.set_adapter(_lora_key(name))
    elif getattr(model, "peft_config", {}):
        model.disable_adapters()


def _lora_key(name: str) -> str:
    """Return the name as peft takes it: module names hold no dot, and "Qwen2.5@7" is a valid adapter name."""
    return "adapter_" + name.encode().hex()


def _lora_tensors(model: Any) -> dict[str, Tensor]:
    return {key: value for key, value in model.named_parameters() if ".lora_" in key}


def _verify_lora(model: Any, name: str, path: str, others: dict[str, Tensor]) -> None:
    # A loader that skips what it does not recognise leaves random or zero factors: numbers that look like an adapter's.
    from safetensors.torch import load_file

    now = _lora_tensors(model)
    changed = [key for key, value in others.items() if key not in now or not torch.equal(now[key], value)]
    if changed:
        raise ConfigError("loading one adapter changed another", where=changed[0])
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise ConfigError("the adapter has no adapter_model.safetensors", where=path)
    sent = load_file(file)
    mine = {key.replace(f".{name}.", "."): value for key, value in now.items() if key not in others}
    for key, value in sent.items():
        if ".lora_" not in key:
            continue
        got = mine.pop(key.removeprefix(_LORA_PREFIX), None)
        if got is None or not torch.equal(got.cpu(), value.to(got.dtype)):
            raise ConfigError("the adapter does not fit the model", where=f"{path}: {key}")
    if mine:
        raise ConfigError("the adapter lacks factors its config names", where=f"{path}: {min(mine)}")

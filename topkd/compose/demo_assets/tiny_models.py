"""Tiny causal LMs trained on the spot, for the demo: same tokenizer, different size and training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A Llama-class config and how long it trains."""

    hidden: int
    layers: int
    heads: int
    steps: int
    vocab_size: int = 1024
    context: int = 256
    batch: int = 16
    length: int = 128
    lr: float = 3e-3
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """Every field, for cache keys and records."""
        return asdict(self)


def build_model(spec: TinyModel) -> Any:
    """A freshly initialised Llama with ``spec``'s shape, the same weights for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(spec.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden,
            intermediate_size=spec.hidden * 3,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.heads,
            max_position_embeddings=spec.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def train_model(
    model: Any, spec: TinyModel, stream: NDArray[np.int32], on_step: Callable[[int, float], None] | None = None
) -> float:
    """Plain next-token training on random windows of ``stream``; returns the mean loss of the last tenth of it."""
    generator = np.random.default_rng(spec.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, 0.95), weight_decay=0.01)
    ids = torch.from_numpy(stream.astype(np.int64))
    losses = []
    model.train()
    for step in range(spec.steps):
        starts = generator.integers(0, len(ids) - spec.length - 1, size=spec.batch)
        batch = torch.stack([ids[start : start + spec.length] for start in starts.tolist()])
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / spec.steps)))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step + 1, losses[-1])
    model.eval()
    return float(np.mean(losses[-max(1, spec.steps // 10) :]))


def save_model(model: Any, folder: Path) -> None:
    """As a Hugging Face model folder."""
    model.save_pretrained(folder)

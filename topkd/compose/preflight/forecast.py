"""Estimates a run's memory, tokens and requests, from its config and the model's shape alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from topkd.clients.dialects.records import DIALECTS
from topkd.compose.config.run_config import RunConfig
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import ConfigError

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Model:
    """A student's shape, without its weights.

    Attributes:
        parameters: Number of all parameters; a tied head counts once.
        trained: Number of parameters that are trained.
        layers: Transformer blocks.
        hidden: Width.
        intermediate: Width inside a block.
        kv_width: Numbers in the KV cache per token and layer, keys and values together.
        vocab: Rows of the output head.
    """

    parameters: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Estimates of the memory that the student needs, and of the requests to the teacher.

    ``memory`` has the bytes of each part; ``available`` is the memory of the device, 0 if it is not known.
    """

    model: Model
    memory: dict[str, int]
    available: int
    epochs: float
    prompts_per_step: int
    completions_per_step: int
    tokens_per_step: int
    teacher_tokens_per_step: int
    teacher_requests_per_step: int
    teacher_reply_bytes_per_step: int
    totals: dict[str, int] = field(default_factory=dict)

    @property
    def memory_total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.memory.values())


def read_model_shape(config: RunConfig) -> Model:
    """Read the student's shape from its config file; no weight is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        shape = AutoConfig.from_pretrained(config.student.model)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(shape)
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        raise ConfigError("cannot read the student's shape", where=config.student.model, got=reason) from error
    parameters = sum(weights.numel() for weights in model.parameters())
    if config.student.lora is not None:
        from topkd.engine.models.lora import with_adapter

        with torch.device("meta"):
            model = with_adapter(model, config.student.lora)
    trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    text = shape.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    per_head = int(getattr(text, "head_dim", 0) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return Model(
        parameters=parameters,
        trained=trained,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        kv_width=2 * kv_heads * per_head,
        vocab=int(text.vocab_size),
    )


def forecast(config: RunConfig, rows: list[PromptRow], device: Any, dialects: Mapping[str, str]) -> Forecast:
    """Estimate memory, tokens and requests of a run on ``device``, with completions of full length.

    ``dialects`` has the dialect of each teacher behind a server.
    """
    model, rollout = read_model_shape(config), config.rollout
    prompts = rollout.prompts_per_step
    completions = prompts * rollout.samples_per_prompt
    own = float(np.mean([row.prompt_ids.size for row in rows]))
    teacher_side = float(np.mean([row.teacher_prompt_ids.size for row in rows]))
    longest = max(row.prompt_ids.size for row in rows)
    served = sum(row.teacher_id in dialects for row in rows) / len(rows)
    asked = round(completions * served)
    longest_reply = [
        DIALECTS.get(dialects[row.teacher_id], DIALECTS["vllm"]).reply.size(
            row.teacher_prompt_ids.size, rollout.max_completion_tokens, config.k
        )
        for row in rows
        if row.teacher_id in dialects
    ]
    per_step = {
        "tokens": round(completions * (own + rollout.max_completion_tokens)),
        "teacher_tokens": round(asked * (teacher_side + rollout.max_completion_tokens + 1)),
        "teacher_requests": asked,
        "teacher_reply_bytes": round(asked * float(np.mean(longest_reply))) if longest_reply else 0,
    }
    return Forecast(
        model=model,
        memory=_estimate_memory(config, model, longest + rollout.max_completion_tokens, device),
        available=_find_available_memory(device),
        epochs=config.steps * prompts / len(rows),
        prompts_per_step=prompts,
        completions_per_step=completions,
        totals={name: value * config.steps for name, value in per_step.items()},
        **{f"{name}_per_step": value for name, value in per_step.items()},
    )


def _estimate_memory(config: RunConfig, model: Model, longest: int, device: Any) -> dict[str, int]:
    learner, size = config.learner, _BYTES[config.student.dtype]
    moments = 2 if learner.optimizer == "adamw_8bit" else 2 * size
    half = learner.autocast == "bfloat16" or (learner.autocast == "auto" and device.type == "cuda")
    number = 2 if half else size
    completions = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    tokens = max(min(learner.micro_batch_tokens, completions * longest), longest)
    # A block keeps about the inputs of its matrix products: per token 10 x hidden and 3 x intermediate.
    block = tokens * (10 * model.hidden + 3 * model.intermediate) * number
    kept = tokens * model.hidden * number
    activations = model.layers * kept + block if learner.gradient_checkpointing else model.layers * block
    sequences = min(config.rollout.batch_size, completions)
    cache = sequences * longest * model.layers * model.kv_width * size if config.sampler.kind == "in_process" else 0
    parts = {
        "weights": model.parameters * size,
        "gradients": model.trained * size,
        "optimiser": model.trained * moments,
        "activations": activations,
        "sampling cache": cache,
    }
    for teacher in config.teacher_map().values():
        if teacher.kind == "local" or (teacher.kind == "self" and teacher.ema > 0.0):
            parts["teacher"] = parts.get("teacher", 0) + model.parameters * 4  # as large as the student, at least
    return {name: value for name, value in parts.items() if value}


def _find_available_memory(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0

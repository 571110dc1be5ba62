"""LoRA adapters written by hand in PEFT's file format, and their exact effect on the base weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TARGETS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
RANK, ALPHA = 4, 8
_PREFIX = "base_model.model."


def make_adapter(base: Path, out: Path, *, seed: int, std: float = 0.05) -> Path:
    """A rank-4 adapter on every linear layer, both factors random (a fresh LoRA's B is zero: it would test nothing)."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem.rsplit(".", 1)[-1] in sum(TARGETS.values(), ()) and name.endswith(".weight"):
            rows, cols = weight.shape
            factors[f"{_PREFIX}{stem}.lora_A.weight"] = torch.randn(RANK, cols, generator=generator) * std
            factors[f"{_PREFIX}{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * std
    out.mkdir(parents=True)
    save_file(factors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(sum(TARGETS.values(), ())),
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return out


@torch.no_grad()
def merge_adapter(model: torch.nn.Module, adapter: Path) -> None:
    """Adds alpha/r * B A to each adapted weight, in the model's own precision."""
    factors = load_file(adapter / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    for name, a in factors.items():
        if name.endswith(".lora_A.weight"):
            b = factors[name.replace("lora_A", "lora_B")]
            weight = parameters[name.removeprefix(_PREFIX).replace(".lora_A.weight", ".weight")]
            weight += (ALPHA / RANK) * (b.to(weight.dtype) @ a.to(weight.dtype))

"""A run's checkpoint on disk: everything a resumed run needs to continue exactly.

A checkpoint holds the trained weights (the whole student, or with LoRA only the adapter), the states of the optimiser,
the schedules and the random number generators, the position, and the rollouts in flight that later weights cannot
sample again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from topkd.engine.checkpoint.snapshots import find_newest_snapshot, write_folder, write_snapshot
from topkd.engine.learner.learner import Learner, LearnerState
from topkd.engine.loop.hooks import Position, Queued
from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError
from topkd.topk.wire import read_rollouts, write_rollouts

FOLDER = "checkpoints"
_STATE, _RANDOM = "state.json", "random.safetensors"
_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


class Stateful(Protocol):
    """A part besides the learner that a step depends on, such as a teacher that averages the student's weights."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the state as complete (unsharded) tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> object:
        """Restore a saved state."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder whose files match their checksums.

    Attributes:
        path: The folder.
        position: The run's position.
        run_log_bytes: Length of the run log at that position.
        notes: Values that the caller saved with it.
    """

    path: Path
    position: Position
    run_log_bytes: int
    notes: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    out: Path,
    position: Position,
    *,
    learner: Learner,
    run_log_bytes: int,
    keep: int,
    remembered: bool,
    stateful: Mapping[str, Stateful] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of ``position`` under ``out``; the learner must be idle.

    Args:
        out: The run's folder.
        position: The run's position.
        learner: Weights, optimiser and schedules.
        run_log_bytes: Length of the run log at that position.
        keep: How many checkpoints to keep.
        remembered: The source of the rollouts (a cache, a replay) can supply those in flight again: do not save them.
        stateful: Other parts with a state, by name.
        notes: The caller's own values, written as they are.
    """
    state = learner.state_dict()
    trained = learner.student.trained()
    queue = [_describe_queue(queued, remembered=remembered) for queued in position.queue]
    values = {
        "step": position.step,
        "evaluated": position.evaluated,
        "elapsed_s": position.elapsed_s,
        "queue": queue,
        "diary_bytes": run_log_bytes,
        "learner": state.values,
        "frozen": fingerprint_frozen(learner.student),
        "stateful": sorted(stateful or {}),
        "notes": dict(notes or {}),
    }

    def fill(folder: Path) -> None:
        save_tensors(trained, folder / _WEIGHTS)
        save_tensors(state.tensors, folder / _OPTIMIZER)
        save_tensors(collect_random_state(), folder / _RANDOM)
        for name, thing in (stateful or {}).items():
            save_tensors(thing.state_dict(), folder / f"{name}.safetensors")
        for queued, entry in zip(position.queue, queue, strict=True):
            if entry["kept"]:
                write_rollouts(folder / _rollouts(queued.step), queued.rollouts or ())
        (folder / _STATE).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    return write_snapshot(out / FOLDER, position.step, fill, keep=keep)


def find_newest_checkpoint(out: Path, on_damaged: Callable[[str], None]) -> Checkpoint | None:
    """Find a run's newest undamaged checkpoint; call ``on_damaged`` for each damaged one."""
    path = find_newest_snapshot(out / FOLDER, on_damaged)
    if path is None:
        return None
    values = json.loads((path / _STATE).read_text(encoding="utf-8"))
    queue = tuple(
        Queued(
            entry["step"], entry["version"], tuple(entry["versions"]), entry["sample_s"],
            None if entry["places"] is None else tuple(entry["places"]),
            tuple(read_rollouts(path / _rollouts(entry["step"]))) if entry["kept"] else None,
        )
        for entry in values["queue"]
    )  # fmt: skip
    position = Position(values["step"], values["evaluated"], values["elapsed_s"], queue)
    return Checkpoint(path, position, values["diary_bytes"], values["notes"])


def restore(checkpoint: Checkpoint, learner: Learner, stateful: Mapping[str, Stateful] | None = None) -> None:
    """Restore the learner, the random number generators and every other stateful part from a checkpoint."""
    values = json.loads((checkpoint.path / _STATE).read_text(encoding="utf-8"))
    if values["frozen"] != fingerprint_frozen(learner.student):
        raise ConfigError(
            "the student's frozen weights differ from those that the run began with", where=str(checkpoint.path),
            hint="restore the base model that student.model names",
        )  # fmt: skip
    if values["stateful"] != sorted(stateful or {}):
        raise ConfigError(
            "the checkpoint and this run have different stateful parts", where=str(checkpoint.path),
            got=values["stateful"], expected=sorted(stateful or {}),
        )  # fmt: skip
    load_weights(learner.student, read_weights(checkpoint), where=str(checkpoint.path))
    learner.load_state_dict(LearnerState(values["learner"], load_tensors(checkpoint.path / _OPTIMIZER)))
    for name, thing in (stateful or {}).items():
        thing.load_state_dict(load_tensors(checkpoint.path / f"{name}.safetensors"))
    set_random_state(load_tensors(checkpoint.path / _RANDOM))


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read the checkpoint's trained weights."""
    return load_tensors(checkpoint.path / _WEIGHTS)


def load_weights(student: Student, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Set the trained parameters; refuse weights with other names, shapes or dtypes."""
    own = student.trained()
    if differing := sorted(own.keys() ^ weights.keys()):
        raise ConfigError(
            "the weights belong to another student", where=where, got=f"{differing[0]} ({len(differing)} differ)"
        )
    for name, parameter in own.items():
        if parameter.shape != weights[name].shape or parameter.dtype != weights[name].dtype:
            raise ConfigError(
                "the weights belong to another student", where=f"{where}, {name}",
                got=f"{tuple(weights[name].shape)} {weights[name].dtype}",
                expected=f"{tuple(parameter.shape)} {parameter.dtype}",
            )  # fmt: skip
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def fingerprint_frozen(student: Student) -> str:
    """Fingerprint the weights that training does not change, from a sample of each; "" when all weights train."""
    frozen = [(name, p.detach()) for name, p in student.model.named_parameters() if not p.requires_grad]
    if not frozen:
        return ""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(frozen):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        some = tensor.reshape(-1)[:: max(1, tensor.numel() // 1024)].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def save_student(student: Student, tokenizer: Any, path: Path, state: Mapping[str, Any]) -> Path:
    """Write model, tokenizer and ``topkd.json`` as one loadable folder, complete or not at all."""

    def fill(folder: Path) -> None:
        student.model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "topkd.json").write_text(json.dumps(dict(state), indent=2) + "\n", encoding="utf-8")

    return write_folder(path, fill)


def _describe_queue(queued: Queued, *, remembered: bool) -> dict[str, Any]:
    return {
        **{name: getattr(queued, name) for name in ("step", "version", "versions", "sample_s", "places")},
        "kept": not remembered and queued.places is not None and queued.rollouts is not None,
    }


def _rollouts(step: int) -> str:
    return f"rollouts-{step:08d}.jsonl"


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any device and layout to a safetensors file."""
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share storage (views, tied weights); a copy has its own.
        shared = plain.untyped_storage().nbytes() != plain.nbytes or plain.untyped_storage().data_ptr() in places
        own[name] = plain.clone() if shared else plain
        places.add(own[name].untyped_storage().data_ptr())
    save_file(own, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU."""
    from safetensors.torch import load_file

    return dict(load_file(path))


def collect_random_state() -> dict[str, Tensor]:
    """Collect the random states of torch (CPU and CUDA), NumPy and Python as tensors."""
    version, words, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - what libraries draw from
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss], dtype=torch.int64),  # type: ignore[union-attr]
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    for number, cuda in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        state[f"cuda{number}"] = cuda
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Set the random states; skip those of a GPU that this machine does not have."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, place, has_gauss = state["numpy"].tolist()
    cached = float(state["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, cached))  # noqa: NPY002
    if torch.cuda.is_available():
        there = [state[f"cuda{number}"] for number in range(torch.cuda.device_count()) if f"cuda{number}" in state]
        for number, cuda in enumerate(there):
            torch.cuda.set_rng_state(cuda, number)

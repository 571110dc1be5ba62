"""The demo's tokenizer, teacher and student: from the cache, or trained now."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topkd.compose.demo_assets import corpus
from topkd.compose.demo_assets.folders import open_scratch_folder
from topkd.compose.progress import Progress
from topkd.engine.loop.prompts import PromptRow

CORPUS_BYTES = 4_000_000
HELD_OUT_TOKENS = 150_000
VOCAB = 1024
PROMPT_TOKENS = 24
TEACHER = {"hidden": 160, "layers": 3, "heads": 4, "steps": 600}
STUDENT = {"hidden": 96, "layers": 2, "heads": 2, "steps": 120, "seed": 1}


@dataclass(frozen=True, slots=True)
class Assets:
    """The cached folders and the token stream behind the demo."""

    teacher: Path
    student: Path
    training: NDArray[np.int32]
    held_out: NDArray[np.int32]


def cache_root() -> Path:
    """Where trained demo models are kept: $XDG_CACHE_HOME/topkd or ~/.cache/topkd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topkd"


def build_assets(cache: Path, progress: Progress, check_stop: Callable[[], None] | None = None) -> Assets:
    """Tokenizer, teacher and student from the cache, or trained now; the key is everything they depend on."""
    files = corpus.list_library_files(CORPUS_BYTES)
    texts = corpus.read_texts(files)
    recipe = json.dumps({"vocab": VOCAB, "teacher": TEACHER, "student": STUDENT, "held_out": HELD_OUT_TOKENS})
    digest = hashlib.blake2b(recipe.encode(), digest_size=8)
    for text in texts:
        digest.update(hashlib.blake2b(text.encode()).digest())
    folder = cache / "demo" / digest.hexdigest()
    if not (folder / "stream.npy").exists():
        _train_assets(texts, folder, progress, check_stop)
    stream = np.load(folder / "stream.npy")
    return Assets(folder / "teacher", folder / "student", stream[:-HELD_OUT_TOKENS], stream[-HELD_OUT_TOKENS:])


def _train_assets(texts: list[str], folder: Path, progress: Progress, check_stop: Callable[[], None] | None) -> None:
    from topkd.compose.demo_assets import tiny_models as tiny

    def learnt(step: int, loss: float) -> None:
        progress.advance(step, f"loss {loss:.2f}")
        if check_stop is not None:
            check_stop()

    with open_scratch_folder(folder, progress) as staging:
        if (folder / "stream.npy").exists():  # made by another demo meanwhile
            return
        progress.note("training a byte-level BPE on the Python standard library's sources")
        corpus.train_tokenizer(texts[: len(texts) // 2], VOCAB, staging / "tokenizer")
        stream = corpus.encode_texts(texts, staging / "tokenizer")
        for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
            spec = tiny.TinyModel(vocab_size=VOCAB, **shape)
            model = tiny.build_model(spec)
            progress.stage(f"train the {name}", spec.steps)
            tiny.train_model(model, spec, stream[:-HELD_OUT_TOKENS], learnt)
            tiny.save_model(model, staging / name)
            shutil.copytree(staging / "tokenizer", staging / name, dirs_exist_ok=True)
        np.save(staging / "stream.npy", stream)
        if not folder.exists():  # where files have no locks another demo may have finished first: as good
            staging.rename(folder)


def choose_prompts(training: NDArray[np.int32], seed: int) -> list[PromptRow]:
    """Random windows of the training stream, 4,096 of them, chosen by the seed."""
    starts = np.random.default_rng([seed, 1]).integers(0, len(training) - PROMPT_TOKENS, size=4096)
    windows = [training[start : start + PROMPT_TOKENS] for start in starts]
    return [PromptRow(window, window, "", f"window {start}") for window, start in zip(windows, starts, strict=True)]

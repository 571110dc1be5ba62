"""The demo's tokenizer, teacher and student: loaded from a cache, or trained on the standard library's source code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topkd.compose.demo_assets.folders import open_scratch_folder
from topkd.compose.progress import Progress
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import ConfigError
from topkd.topk.samples import SamplingParams

if TYPE_CHECKING:
    from topkd.engine.models.divergences import Probe
    from topkd.engine.models.student import Student

CORPUS_BYTES = 4_000_000
HELD_OUT_TOKENS = 150_000
VOCAB = 1024
PROMPT_TOKENS = 24
TEACHER = {"hidden": 160, "layers": 3, "heads": 4, "steps": 600}
STUDENT = {"hidden": 96, "layers": 2, "heads": 2, "steps": 120, "seed": 1}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Assets:
    """The cached folders and the token stream behind the demo."""

    teacher: Path
    student: Path
    training: NDArray[np.int32]
    held_out: NDArray[np.int32]


def cache_root() -> Path:
    """Return where trained demo models are kept: $XDG_CACHE_HOME/topkd or ~/.cache/topkd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topkd"


def build_assets(cache: Path, progress: Progress, check_stop: Callable[[], None] | None = None) -> Assets:
    """Load tokenizer, teacher and student from the cache, or train them; the cache key covers all they depend on."""
    files = list_library_files(CORPUS_BYTES)
    texts = read_texts(files)
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
    def show_step(step: int, loss: float) -> None:
        progress.advance(step, f"loss {loss:.2f}")
        if check_stop is not None:
            check_stop()

    with open_scratch_folder(folder, progress) as staging:
        if (folder / "stream.npy").exists():  # another demo has made it meanwhile
            return
        progress.note("training a byte-level BPE on the Python standard library's sources")
        train_tokenizer(texts[: len(texts) // 2], VOCAB, staging / "tokenizer")
        stream = encode_texts(texts, staging / "tokenizer")
        for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
            spec = TinyModel(vocab_size=VOCAB, **shape)
            model = build_model(spec)
            progress.stage(f"train the {name}", spec.steps)
            train_model(model, spec, stream[:-HELD_OUT_TOKENS], show_step)
            save_model(model, staging / name)
            shutil.copytree(staging / "tokenizer", staging / name, dirs_exist_ok=True)
        np.save(staging / "stream.npy", stream)
        if not folder.exists():  # without file locks, another demo may have made the same models first
            staging.rename(folder)


def choose_prompts(training: NDArray[np.int32], seed: int) -> list[PromptRow]:
    """Choose 4,096 random windows of the training stream, by the seed."""
    starts = np.random.default_rng([seed, 1]).integers(0, len(training) - PROMPT_TOKENS, size=4096)
    windows = [training[start : start + PROMPT_TOKENS] for start in starts]
    return [PromptRow(window, window, "", f"window {start}") for window, start in zip(windows, starts, strict=True)]


def list_library_files(max_bytes: int) -> list[Path]:
    """List modules of the running Python's standard library in a fixed, mixed order, up to ``max_bytes``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "encodings", "pydoc_data"}
    found = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts[:-1]))
    # Order by a hash of the name: any prefix is a mixture, the same one on every machine with this Python.
    found.sort(key=lambda path: hashlib.blake2b(str(path.relative_to(root)).encode(), digest_size=8).digest())
    chosen, total = [], 0
    for path in found:
        size = path.stat().st_size
        if 1_000 <= size <= 100_000 and total + size <= max_bytes:
            chosen.append(path)
            total += size
    if total < max_bytes // 2:
        raise ConfigError(
            "too little Python source here to train the demo on",
            where=str(root),
            got=f"{total} bytes",
            expected=f"{max_bytes // 2}",
            hint="run it with a Python that ships its standard library as .py files",
        )
    return chosen


def read_texts(files: list[Path]) -> list[str]:
    """Read the files' texts; undecodable bytes are replaced (a handful of test-like modules have them)."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and save it where transformers finds it, with a chat template."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIALS[0], pad_token=SPECIALS[0], clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def encode_texts(texts: list[str], folder: Path) -> NDArray[np.int32]:
    """Encode all texts as one stream of ids, each ended by the end-of-text token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(SPECIALS[0])
    ids = [np.array([*encoding.ids, end], dtype=np.int32) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(ids)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """The shape of a small Llama model, and its training settings."""

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


def build_model(spec: TinyModel) -> Any:
    """Build a freshly initialised Llama of ``spec``'s shape, the same weights for the same seed."""
    import torch
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
    """Train on next tokens in random windows of ``stream``; return the mean loss of the last tenth of the steps."""
    import torch

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
    """Write a Hugging Face model folder."""
    model.save_pretrained(folder)


async def continue_prompts(
    model: Student, prompts: Sequence[NDArray[np.int32]], tokens: int, stop_ids: Sequence[int] = ()
) -> list[Probe]:
    """Sample at most ``tokens`` tokens after each prompt, with a fixed seed."""
    from topkd.engine.models.divergences import Probe
    from topkd.engine.models.sampler import InProcessSampler

    sampler = InProcessSampler(model, stop_ids=stop_ids)
    drawn = await sampler.sample_batch(prompts, 1, SamplingParams(max_tokens=tokens, seed=7))
    return [
        Probe(np.concatenate([rollout.prompt_ids, rollout.completion_ids]), rollout.prompt_ids.size)
        for (rollout,) in drawn
    ]

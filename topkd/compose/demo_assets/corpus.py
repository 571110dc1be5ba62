"""A corpus and a tokenizer that every Python has: its own standard library's sources. No network, no download."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topkd.topk.errors import ConfigError

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def list_library_files(max_bytes: int) -> list[Path]:
    """Modules and packages of the running Python's standard library in a fixed, mixed order, up to ``max_bytes``."""
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
    """The files' texts; undecodable bytes are replaced (a handful of test-like modules have them)."""
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
    """All texts as one stream of ids, each ended by the end-of-text token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(SPECIALS[0])
    ids = [np.array([*encoding.ids, end], dtype=np.int32) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(ids)

"""What the examples share: a tokenizer and small models made on the spot, that name letters. Nothing is downloaded.

A teacher has learnt what follows each letter: "k>" -> "l" (and with "<", what comes before). A student has only learnt
to repeat what it is told first ("it is l" and a line break, "k>" -> "l"), and has seen wrong answers otherwise. It is
what a language model is to a hard task: it cannot do it, but it understands a hint.
"""

import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from topkd.compose.demo_assets import corpus
from topkd.compose.demo_assets import tiny_models as tiny
from topkd.engine.loop.metrics import read_metrics

LETTERS = string.ascii_letters
_PAD = -1


def row(letter: str, sign: str = ">") -> dict[str, str]:
    """A row of a data file: the prompt, its answer, and a hint for whoever may see it."""
    place = LETTERS.index(letter) + (1 if sign == ">" else -1)
    answer = LETTERS[place % len(LETTERS)]
    return {"prompt": f"{letter}{sign}", "answer": answer, "hint": f"it is {answer}", "id": f"{letter}{sign}"}


def rows(path: Path, signs: str = ">", **columns: object) -> Path:
    """Every letter as JSONL; ``columns`` joins each row, a dictionary by sign, and ``hint=None`` leaves it out."""
    own = {name: value if isinstance(value, dict) else dict.fromkeys(signs, value) for name, value in columns.items()}
    lines = [
        json.dumps(row(letter, sign) | {name: by_sign[sign] for name, by_sign in own.items()})
        for sign in signs
        for letter in LETTERS
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def teacher(folder: Path, signs: str = ">", steps: int = 150) -> Path:
    """A model that knows the answers for these signs."""
    return _made(folder, [_plain(row(letter, sign)) for sign in signs for letter in LETTERS], steps, seed=0)


def student(folder: Path, signs: str = ">", steps: int = 200) -> Path:
    """A model that follows a hint, and without one has only seen wrong answers."""
    known = [row(letter, sign) for sign in signs for letter in LETTERS]
    hinted = [f"{one['hint']}\n{_plain(one)}" for one in known]
    wrong = [f"{one['prompt']}{LETTERS[(7 * place + 3) % 52]}" for place, one in enumerate(known)]
    return _made(folder, hinted * 3 + wrong, steps, seed=1)


def told(out: Path) -> dict[str, float]:
    """Print how a run's evaluations went; the first and last numbers of what was measured."""
    records = [one for one in read_metrics(out / "metrics.jsonl", "eval") if one.get("prefixes", "fixed") == "fixed"]
    names = [name for name in ("accuracy", "reverse_kl") if name in records[0]]
    for one in records:
        print(f"step {one['step']:>4}  " + "  ".join(f"{name} {one[name]:.3f}" for name in names))
    return {f"{name}_{when}": records[at][name] for name in names for when, at in (("before", 0), ("after", -1))}


def folder_of(example: str) -> Path:
    """Where an example writes: the folder given on the command line, or runs/examples/NAME."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/examples/{Path(example).stem}")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _plain(one: dict[str, str]) -> str:
    return f"{one['prompt']}{one['answer']}"


def _made(folder: Path, texts: list[str], steps: int, seed: int) -> Path:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    corpus.train_tokenizer([], 259, folder)  # 256 bytes and three special tokens: a letter is a token
    spec = tiny.TinyModel(hidden=64, layers=2, heads=2, steps=steps, vocab_size=259, context=64, seed=seed)
    model = tiny.build_model(spec)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in _batches([[*tokenizer(text)["input_ids"], end] for text in texts], steps, seed):
        labels = batch.masked_fill(batch == _PAD, -100)
        model(input_ids=batch.clamp_min(0), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    tiny.save_model(model, folder)
    return folder


def _batches(texts: list[list[int]], steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = max(map(len, texts))
    padded = torch.tensor([text + [_PAD] * (width - len(text)) for text in texts])
    for _ in range(steps):
        yield padded[torch.randint(len(padded), (64,), generator=generator)]

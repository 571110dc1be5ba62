"""The task of the examples: tiny models that name letters, and their data. Nothing is downloaded.

The teacher knows the letter after each letter: "k>" -> "l" (or with "<" the letter before). The student can only repeat
a hint ("it is l" and a line break, "k>" -> "l"); without one it has learnt wrong answers. So it cannot do the task, but
it understands a hint, as a language model does with a hard task.
"""

import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from topkd.compose.demo_assets import assets
from topkd.engine.loop.metrics import read_metrics

LETTERS = string.ascii_letters
_PAD = -1


def build_row(letter: str, sign: str = ">") -> dict[str, str]:
    """Build a row of a data file: the prompt, its answer, and a hint."""
    place = LETTERS.index(letter) + (1 if sign == ">" else -1)
    answer = LETTERS[place % len(LETTERS)]
    return {"prompt": f"{letter}{sign}", "answer": answer, "hint": f"it is {answer}", "id": f"{letter}{sign}"}


def write_rows(path: Path, signs: str = ">", **columns: object) -> Path:
    """Write a row for each letter; ``columns`` adds columns (a dictionary: by sign), ``hint=None`` has no hint."""
    own = {name: value if isinstance(value, dict) else dict.fromkeys(signs, value) for name, value in columns.items()}
    lines = [
        json.dumps(build_row(letter, sign) | {name: by_sign[sign] for name, by_sign in own.items()})
        for sign in signs
        for letter in LETTERS
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train_teacher(folder: Path, signs: str = ">", steps: int = 150) -> Path:
    """Train a model that knows the answers for these signs."""
    texts = [_join_answer(build_row(letter, sign)) for sign in signs for letter in LETTERS]
    return _train(folder, texts, steps, seed=0)


def train_student(folder: Path, signs: str = ">", steps: int = 200) -> Path:
    """Train a model that repeats a hint, and without one gives wrong answers."""
    rows = [build_row(letter, sign) for sign in signs for letter in LETTERS]
    hinted = [f"{row['hint']}\n{_join_answer(row)}" for row in rows]
    wrong = [f"{row['prompt']}{LETTERS[(7 * place + 3) % 52]}" for place, row in enumerate(rows)]
    return _train(folder, hinted * 3 + wrong, steps, seed=1)


def print_evaluations(out: Path) -> None:
    """Print what a run's evaluations measured."""
    records = read_metrics(out / "metrics.jsonl", "eval")
    fixed = [record for record in records if record.get("prefixes", "fixed") == "fixed"]
    names = [name for name in ("accuracy", "reverse_kl") if name in fixed[0]]
    for record in fixed:
        print(f"step {record['step']:>4}  " + "  ".join(f"{name} {record[name]:.3f}" for name in names))


def make_output_folder(example: str) -> Path:
    """Make the folder that an example writes to: its first argument, or runs/examples/NAME."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/examples/{Path(example).stem}")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _join_answer(row: dict[str, str]) -> str:
    return f"{row['prompt']}{row['answer']}"


def _train(folder: Path, texts: list[str], steps: int, seed: int) -> Path:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    assets.train_tokenizer([], 259, folder)  # 256 bytes and three special tokens: a letter is a token
    spec = assets.TinyModel(hidden=64, layers=2, heads=2, steps=steps, vocab_size=259, context=64, seed=seed)
    model = assets.build_model(spec)
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
    assets.save_model(model, folder)
    return folder


def _batches(texts: list[list[int]], steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = max(map(len, texts))
    padded = torch.tensor([text + [_PAD] * (width - len(text)) for text in texts])
    for _ in range(steps):
        yield padded[torch.randint(len(padded), (64,), generator=generator)]

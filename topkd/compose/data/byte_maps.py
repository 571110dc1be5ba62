"""Byte maps of tokenizers, with transformers' own encoding of a text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from topkd.clients.decoding.byte_map import ByteMap, load_bytemap


def load_student_byte_map(source: str | Path) -> ByteMap:
    """Load a tokenizer's byte map; set ``loaded`` if transformers is installed and the source is a model folder."""
    table = load_bytemap(source)
    if table.source is None:
        return table
    try:
        from transformers import AutoTokenizer

        loaded: Any = AutoTokenizer.from_pretrained(str(table.source), local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return table  # then only tokenizer.json is used
    return replace(table, loaded=lambda text: [int(token) for token in loaded.encode(text, add_special_tokens=False)])

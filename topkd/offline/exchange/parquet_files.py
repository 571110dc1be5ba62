"""Parquet files as they come from users: one that is missing, damaged or none at all is named in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topkd.topk.errors import ConfigError, DataError


def import_parquet_module() -> Any:
    """``pyarrow.parquet``, or a ConfigError that says how to get it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow", hint='pip install "topkd[data]"') from error
    return pyarrow.parquet


def open_parquet(path: Path) -> Any:
    """A ``ParquetFile``; raises DataError where there is none to be read."""
    with _find_columns(path):
        return import_parquet_module().ParquetFile(path)


def read_batches(file: Any, path: Path, **options: Any) -> Iterator[Any]:
    """``file.iter_batches(**options)``; damage that shows only while reading is a DataError too."""
    batches = file.iter_batches(**options)
    while True:
        with _find_columns(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _find_columns(path: Path) -> Iterator[None]:
    import_parquet_module()
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError("cannot read the Parquet file", where=str(path), got=reason[0]) from error

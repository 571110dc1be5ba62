"""Read Parquet files; a missing or damaged file gives a one-line error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topkd.topk.errors import ConfigError, DataError


def import_parquet_module() -> Any:
    """Import ``pyarrow.parquet``, or raise a ConfigError that says how to install it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow", hint='pip install "topkd[data]"') from error
    return pyarrow.parquet


def open_parquet(path: Path) -> Any:
    """Open a ``ParquetFile``; raise DataError where it cannot be read."""
    with _convert_read_errors(path):
        return import_parquet_module().ParquetFile(path)


def read_batches(file: Any, path: Path, **options: Any) -> Iterator[Any]:
    """Iterate over ``file.iter_batches(**options)``; raise DataError where the file is damaged."""
    batches = file.iter_batches(**options)
    while True:
        with _convert_read_errors(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _convert_read_errors(path: Path) -> Iterator[None]:
    import_parquet_module()
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError("cannot read the Parquet file", where=str(path), got=reason[0]) from error

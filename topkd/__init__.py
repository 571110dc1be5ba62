"""topkd: distil a teacher you can reach only through an API.

The public API is here; each name is imported at its first use, so ``import topkd`` loads neither torch nor vllm nor
transformers::

    import topkd

    config = topkd.load_config("run.toml")
    result = await topkd.train(config, "runs/first")

The subpackages, and what each knows:

* ``topkd.topk`` - what a top-K logprob is, and all the maths on it (torch only in ``losses``, ``fused``, ``schedule``).
* ``topkd.clients`` - how to ask servers: one dialect a file, one transport, one retry policy.
* ``topkd.engine`` - sampling, scoring, and training steps.
* ``topkd.offline`` - the score cache and replay.
* ``topkd.serve`` - the embedded server: a Hugging Face causal LM behind the API of vLLM or SGLang.
* ``topkd.report`` - HTML reports and figures about runs.
* ``topkd.compose`` - the commands as functions: it connects the other subpackages, from one frozen config.
* ``topkd.cli`` - the command line, a thin layer on ``compose``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topkd.clients.config import ClientConfig
    from topkd.clients.connection import connect
    from topkd.clients.probe.probe import probe
    from topkd.compose.bulk.config import SampleConfig, ScoreConfig
    from topkd.compose.compare import compare
    from topkd.compose.comparison.config import CompareConfig, load_compare
    from topkd.compose.config.run_config import RunConfig, load_config
    from topkd.compose.export import export
    from topkd.compose.replay import replay
    from topkd.compose.sample import sample
    from topkd.compose.score import score
    from topkd.compose.train import train
    from topkd.offline.store.store import ScoreStore, open_store
    from topkd.serve.config import ServeConfig
    from topkd.topk.errors import (
        AlignmentError,
        AuthError,
        CacheCorruptError,
        CacheError,
        CacheMissError,
        ConfigError,
        ContextLimitError,
        DataError,
        FinalServerError,
        KLimitError,
        ModelNotFoundError,
        RequestRefusedError,
        ResponseError,
        RetryableServerError,
        ServerBusyError,
        ServerError,
        ServerFailedError,
        ServerPausedError,
        ServerTimeoutError,
        ServerUnreachableError,
        SyncError,
        TopkdError,
        TrainingError,
        UnsupportedError,
    )
    from topkd.topk.types import TopK

__version__ = "0.1.0"

_HOMES = {
    "AlignmentError": "topkd.topk.errors",
    "AuthError": "topkd.topk.errors",
    "CacheCorruptError": "topkd.topk.errors",
    "CacheError": "topkd.topk.errors",
    "CacheMissError": "topkd.topk.errors",
    "ClientConfig": "topkd.clients.config",
    "CompareConfig": "topkd.compose.comparison.config",
    "ConfigError": "topkd.topk.errors",
    "ContextLimitError": "topkd.topk.errors",
    "DataError": "topkd.topk.errors",
    "FinalServerError": "topkd.topk.errors",
    "KLimitError": "topkd.topk.errors",
    "ModelNotFoundError": "topkd.topk.errors",
    "RequestRefusedError": "topkd.topk.errors",
    "ResponseError": "topkd.topk.errors",
    "RetryableServerError": "topkd.topk.errors",
    "RunConfig": "topkd.compose.config.run_config",
    "SampleConfig": "topkd.compose.bulk.config",
    "ScoreConfig": "topkd.compose.bulk.config",
    "ScoreStore": "topkd.offline.store.store",
    "ServeConfig": "topkd.serve.config",
    "ServerBusyError": "topkd.topk.errors",
    "ServerError": "topkd.topk.errors",
    "ServerFailedError": "topkd.topk.errors",
    "ServerPausedError": "topkd.topk.errors",
    "ServerTimeoutError": "topkd.topk.errors",
    "ServerUnreachableError": "topkd.topk.errors",
    "SyncError": "topkd.topk.errors",
    "TopK": "topkd.topk.types",
    "TopkdError": "topkd.topk.errors",
    "TrainingError": "topkd.topk.errors",
    "UnsupportedError": "topkd.topk.errors",
    "compare": "topkd.compose.compare",
    "connect": "topkd.clients.connection",
    "export": "topkd.compose.export",
    "load_compare": "topkd.compose.comparison.config",
    "load_config": "topkd.compose.config.run_config",
    "open_store": "topkd.offline.store.store",
    "probe": "topkd.clients.probe.probe",
    "replay": "topkd.compose.replay",
    "sample": "topkd.compose.sample",
    "score": "topkd.compose.score",
    "train": "topkd.compose.train",
}
__all__ = [
    "AlignmentError",
    "AuthError",
    "CacheCorruptError",
    "CacheError",
    "CacheMissError",
    "ClientConfig",
    "CompareConfig",
    "ConfigError",
    "ContextLimitError",
    "DataError",
    "FinalServerError",
    "KLimitError",
    "ModelNotFoundError",
    "RequestRefusedError",
    "ResponseError",
    "RetryableServerError",
    "RunConfig",
    "SampleConfig",
    "ScoreConfig",
    "ScoreStore",
    "ServeConfig",
    "ServerBusyError",
    "ServerError",
    "ServerFailedError",
    "ServerPausedError",
    "ServerTimeoutError",
    "ServerUnreachableError",
    "SyncError",
    "TopK",
    "TopkdError",
    "TrainingError",
    "UnsupportedError",
    "compare",
    "connect",
    "export",
    "load_compare",
    "load_config",
    "open_store",
    "probe",
    "replay",
    "sample",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

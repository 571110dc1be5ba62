"""The public names of docs/stability.md, written out: none appears or vanishes unnoticed."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

CHANGED = "a public name appeared or vanished: change the list AND the changelog"

LISTED: dict[str, list[str]] = {
    "topkd": [
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
    ],
    "topkd.topk": [
        "Behavior",
        "PreparedSample",
        "Rollout",
        "SampleCore",
        "SamplingParams",
        "ScalarBehavior",
        "ScalarPreparedSample",
        "TopK",
        "TopKBehavior",
        "TopKPreparedSample",
        "compute_topk_gjs",
        "discounted_return",
        "entropy_bounds",
        "extract_token_logprobs",
        "forward_kl_advantage",
        "gated_rows",
        "gjs",
        "gjs_advantage",
        "kl_k1",
        "kl_k3",
        "scalar_kl_advantage",
        "shared_support_gjs",
        "slice_completion_topk",
        "topk_gjs",
        "topk_value_baseline",
        "topk_weights",
        "value_baseline",
    ],
    "topkd.topk.losses": [
        "FusedPolicyLoss",
        "KDLoss",
        "SparseTeacher",
        "TAIDScheduler",
        "entropy_aware_opd_loss",
        "eopd_loss",
        "fused_divergence_loss",
        "fused_topk_policy_gradient_loss",
        "generalized_jsd_loss",
        "icepop_loss",
        "importance_sampling_loss",
        "ppo_clip_loss",
        "reinforce_loss",
        "sparse_divergence_loss",
        "sparse_entropy_aware_loss",
        "sparse_eopd_loss",
        "sparse_taid_loss",
        "taid_loss",
        "teacher_entropy",
        "topk_policy_gradient_loss",
    ],
    "topkd.clients": [
        "ClientConfig",
        "FireworksEcho",
        "Fleet",
        "OpenAIChat",
        "ServerInfo",
        "Sglang",
        "SglangWeightSink",
        "TinkerClient",
        "VllmCompletions",
        "VllmGenerate",
        "VllmInProcess",
        "VllmWeightSink",
        "connect",
    ],
    "topkd.engine": [
        "EngineConfig",
        "LearnerConfig",
        "RolloutConfig",
    ],
    "topkd.offline": [
        "CacheMetrics",
        "CacheStats",
        "CachingScorer",
        "Compaction",
        "Exchange",
        "ReplayScorer",
        "ScoreStore",
        "TeacherIdentity",
        "Verification",
        "export_parquet",
        "from_dataset",
        "gc",
        "import_axolotl",
        "import_distillkit",
        "import_parquet",
        "merge",
        "open_store",
        "profile",
        "stats",
        "to_dataset",
        "verify",
    ],
    "topkd.serve": [
        "ServeConfig",
        "ServerProcess",
        "create_app",
        "load_model",
        "serve",
    ],
}
CLASSES: dict[str, list[str]] = {
    "topkd.topk.errors": [
        "AlignmentError",
        "AuthError",
        "CacheCorruptError",
        "CacheError",
        "CacheMissError",
        "ConfigError",
        "ContextLimitError",
        "DataError",
        "FinalServerError",
        "KLimitError",
        "ModelNotFoundError",
        "RequestRefusedError",
        "ResponseError",
        "RetryableServerError",
        "ServerBusyError",
        "ServerError",
        "ServerFailedError",
        "ServerPausedError",
        "ServerTimeoutError",
        "ServerUnreachableError",
        "SyncError",
        "TopkdError",
        "TrainingError",
        "UnsupportedError",
    ],
    "topkd.topk.protocols": [
        "CandidateScorer",
        "Sampler",
        "TeacherScorer",
        "WeightSink",
        "WeightUpdate",
    ],
}
FUNCTIONS = [
    "topkd.compose.demo.demo",
    "topkd.compose.replay.replay",
    "topkd.compose.score.score",
    "topkd.compose.train.train",
]


@pytest.mark.parametrize("package", LISTED)
def test_a_package_offers_the_names_of_the_list_and_has_them(package: str) -> None:
    module = import_module(package)
    assert sorted(module.__all__) == LISTED[package], CHANGED
    missing = [name for name in LISTED[package] if not hasattr(module, name)]
    assert missing == [], CHANGED


@pytest.mark.parametrize("name", CLASSES)
def test_a_module_defines_the_classes_of_the_list(name: str) -> None:
    classes = inspect.getmembers(import_module(name), inspect.isclass)
    public = [known for known, kind in classes if kind.__module__ == name and not known.startswith("_")]
    assert public == CLASSES[name], CHANGED


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_is_where_the_documents_say(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert inspect.iscoroutinefunction(getattr(import_module(module), name, None)), CHANGED

"""Never run: what users write, checked by ``make types`` (mypy, strict)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_never, assert_type

import numpy as np
import torch
from numpy.typing import NDArray

import topkd
from topkd.clients import ClientConfig, ServerInfo, VllmCompletions, connect
from topkd.offline import CachingScorer, ReplayScorer, ScoreStore, TeacherIdentity
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk import (
    Behavior,
    PreparedSample,
    Rollout,
    SampleCore,
    SamplingParams,
    ScalarBehavior,
    ScalarPreparedSample,
    TopK,
    TopKBehavior,
    TopKPreparedSample,
    compute_topk_gjs,
    entropy_bounds,
    extract_token_logprobs,
    gjs,
    gjs_advantage,
    scalar_kl_advantage,
    shared_support_gjs,
    slice_completion_topk,
    topk_gjs,
    topk_weights,
)
from topkd.topk.errors import ConfigError, KLimitError, ServerBusyError, ServerError, TopkdError
from topkd.topk.losses import (
    KDLoss,
    TAIDScheduler,
    entropy_aware_opd_loss,
    eopd_loss,
    generalized_jsd_loss,
    importance_sampling_loss,
    ppo_clip_loss,
    taid_loss,
    teacher_entropy,
    topk_policy_gradient_loss,
)
from topkd.topk.protocols import (
    CandidateScorer,
    Ids,
    Sampler,
    TeacherScorer,
    WeightSink,
    WeightUpdate,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def reading_a_score(score: TopK) -> None:
    """Every array has its dtype, and looking up ids gives values with the mask of what is known."""
    assert_type(score.rows, int)
    assert_type(score.ids, NDArray[np.int32])
    assert_type(score.logp, Float32)
    assert_type(score.tail_logp, Float32)
    assert_type(score.mass(), Float64)
    assert_type(score.ceiling(), Float64)
    logp, known = score.at(score.actual_ids)
    assert_type(logp, Float32)
    assert_type(known, NDArray[np.bool_])
    assert_type(score.slice(slice(1, 3), k=2), TopK)
    assert_type(TopK.concat([score, score]), TopK)


def building_a_score() -> TopK:
    """Lists of (id, logprob), one per position; plain lists serve as the realised tokens."""
    return TopK.from_lists([[(5, -0.1), (7, -2.5)], None], start=3, actual_ids=[5, 9], actual_logp=[-0.1, float("nan")])


def one_sample_is_one_of_two(sample: PreparedSample) -> float:
    """A match over the union is exhaustive: a third variant would be a type error here."""
    match sample:
        case ScalarPreparedSample():
            assert_type(sample.teacher_logp, Float32)
            return float(sample.teacher_logp.sum())
        case TopKPreparedSample():
            assert_type(sample.teacher, TopK)
            return float(sample.teacher.mass().mean())
        case _:
            assert_never(sample)


def the_tag_narrows_too(sample: PreparedSample, behavior: Behavior) -> TopK | None:
    """``kind`` is a literal, so comparing it narrows the union."""
    if behavior.kind == "topk":
        assert_type(behavior, TopKBehavior)
        return behavior.topk
    assert_type(behavior, ScalarBehavior)
    return sample.teacher if sample.kind == "topk" else None


def preparing_a_sample(rollout: Rollout, teacher: TopK) -> PreparedSample:
    """From a rollout and a score to what the learner takes."""
    core = SampleCore(
        full_ids=np.concatenate([rollout.prompt_ids, rollout.completion_ids]),
        prompt_len=rollout.prompt_ids.size,
        mask=np.ones(rollout.completion_ids.size, dtype=np.bool_),
        teacher_prompt_ids=rollout.prompt_ids,
    )
    behavior = ScalarBehavior(rollout.logp) if rollout.topk is None else TopKBehavior(rollout.logp, rollout.topk)
    return TopKPreparedSample(core, behavior, teacher)


class MyTeacher:
    """A teacher of one's own: no base class, the methods are enough."""

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Rows start .. len(ids) - 2."""
        return TopK.from_lists([[(int(token), -0.5)] for token in ids[start + 1 :]], start=start).slice(k=k)

    async def score_candidates(self, ids: Ids, start: int, candidates: NDArray[np.int32]) -> Float32:
        """One logprob a candidate."""
        return np.full(candidates.shape, -1.0, dtype=np.float32)


class MySampler:
    """A sampler of one's own."""

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """n rollouts."""
        prompt = np.asarray(prompt_ids, dtype=np.int32)
        one = Rollout(prompt, np.array([7], np.int32), np.array([-0.1], np.float32), "stop", params)
        return [one] * n


class MySink:
    """Weights to a folder of one's own."""

    async def push(self, update: WeightUpdate) -> str:
        """The version that is now served."""
        return update.version


class MyStore:
    """A store of one's own: a dict."""

    def __init__(self) -> None:
        """Empty."""
        self._rows: dict[tuple[str, tuple[int, ...]], TopK] = {}

    def get(self, teacher: str, ids: Ids, start: int, k: int) -> TopK | None:
        """None is a miss."""
        found = self._rows.get((teacher, tuple(int(token) for token in ids)))
        return None if found is None or found.start > start or found.k < k else found.slice(k=k)

    def put(self, teacher: str, ids: Ids, scores: TopK) -> None:
        """Kept for as long as the process lives."""
        self._rows[teacher, tuple(int(token) for token in ids)] = scores


async def plugging_them_together() -> Sequence[PreparedSample]:
    """Structural typing: each class above is the protocol it implements."""
    teacher: TeacherScorer = MyTeacher()
    candidates: CandidateScorer = MyTeacher()
    sampler: Sampler = MySampler()
    sink: WeightSink = MySink()
    store = MyStore()
    prepared = []
    for rollout in await sampler.sample([1, 2, 3], 2, SamplingParams(max_tokens=16, seed=0), k=20):
        ids = np.concatenate([rollout.prompt_ids, rollout.completion_ids])
        score = store.get("teacher", ids, 2, 20) or await teacher.score(ids, 2, 20)
        store.put("teacher", ids, score)
        assert_type(await candidates.score_candidates(ids, 2, score.ids), Float32)
        prepared.append(preparing_a_sample(rollout, score))
    assert_type(await sink.push(WeightUpdate(kind="lora", path="adapter", version="v1")), str)
    return prepared


async def catching_errors(teacher: TeacherScorer) -> int:
    """One tree; each error is also what Python itself would have raised."""
    try:
        await teacher.score([1, 2], 0, 20)
    except KLimitError as error:
        assert_type(error.limit, int | None)
        return error.exit_code
    except ServerBusyError as error:
        assert_type(error.retry_after_s, float | None)
    except (ConfigError, ServerError) as error:
        return error.exit_code
    except (TimeoutError, ConnectionError, ValueError):
        return 1
    except TopkdError as error:
        assert_type(error.hint, str)
    return 0


def maths_on_arrays(sample: ScalarPreparedSample, teacher_logp_TV: Float64, student_logp_TV: Float64) -> None:
    """NumPy in, NumPy out."""
    behavior = sample.behavior.logp
    assert_type(scalar_kl_advantage(sample.teacher_logp, behavior), NDArray[np.floating])
    assert_type(gjs_advantage(sample.teacher_logp, behavior, 0.5), NDArray[np.floating])
    assert_type(gjs(teacher_logp_TV, student_logp_TV, 0.5), Float64)
    assert_type(shared_support_gjs(teacher_logp_TV, student_logp_TV, 0.5, tail="bucket"), Float64)


def maths_on_scores(teacher: TopK, student: TopK, at_ids_RK: Float32, actual_R: Float32) -> None:
    """Scores in, one value a row out; lists as other code has them work too."""
    assert_type(topk_gjs(teacher, student, 0.5, missing="union_tail", floor=-20.0), Float64)
    assert_type(entropy_bounds(teacher, 151_936), tuple[Float64, Float64])
    w_ids, w_actual = topk_weights(teacher, at_ids_RK, actual_R, beta=0.5, lam=0.3, is_weight=None)
    assert_type(w_ids, NDArray[np.floating])
    assert_type(w_actual, NDArray[np.floating])
    lists = slice_completion_topk([[(1, -0.1)], None, [(2, -0.3)]], prompt_len=1, completion_len=2)
    assert_type(compute_topk_gjs(lists, lists, 0.5, floor_logprob=-20.0), list[float])
    assert_type(extract_token_logprobs(lists, [1, 2], floor_logprob=None), list[float])


def losses_on_tensors(
    student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Every loss is a scalar tensor with a graph."""
    total = generalized_jsd_loss(student, teacher, None, 0.5, 1.0, "batchmean", top_k=20, token_clip=None)
    schedule = TAIDScheduler(100, t_start=0.4, t_end=1.0)
    taid = taid_loss(student, teacher, mask, t=schedule.t)
    schedule.update_t(float(taid.detach()), 1)
    kd: torch.Tensor = KDLoss()(student, teacher, ids)
    total = total + taid + kd
    total = total + entropy_aware_opd_loss(student, teacher, labels=None, h_max=None)
    total = total + eopd_loss(student, teacher, mask=mask, sampled_ids=ids, tau=0.8)
    assert_type(teacher_entropy(teacher), torch.Tensor)
    return total


def policy_gradients(
    new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Importance weights are detached inside; the mask is boolean."""
    plain = importance_sampling_loss(new, old, advantages, mask, cap=2.0, reduction="mean")
    return plain + ppo_clip_loss(new, old, advantages, mask, clip=0.2, dual_clip=3.0)


def the_estimator(at_ids: torch.Tensor, actual: torch.Tensor, teacher: TopK, mask: torch.Tensor) -> torch.Tensor:
    """The teacher's scores go in as they came."""
    return topk_policy_gradient_loss(at_ids, actual, teacher, mask, beta=0.5, lam=0.3, behavior_logp=None, cap=2.0)


async def asking_a_server() -> TopK:
    """A client is a scorer and a sampler; a setting has its unit in its name."""
    config = ClientConfig(connect_timeout_s=2.0, max_retries=3)
    async with VllmCompletions("http://127.0.0.1:8000", model="teacher", api_key="k", config=config) as client:
        teacher: TeacherScorer = client
        sampler: Sampler = client
        assert_type(await client.server_info(), ServerInfo)
        assert_type(client.metrics, dict[str, float])
        (rollout,) = await sampler.sample([1, 2, 3], 1, SamplingParams(max_tokens=8))
        ids = np.concatenate([rollout.prompt_ids, rollout.completion_ids])
        return await teacher.score(ids, start=2, k=20)


async def asking_only_once(folder: str) -> TopK:
    """A live, a cached and a replayed teacher are the same type."""
    identity = TeacherIdentity("teacher", revision="main")
    with ScoreStore(folder, mode="a", codec="packed") as store:
        live = await connect("http://127.0.0.1:8000")
        cached: TeacherScorer = CachingScorer(live, store, identity)
        await cached.score([1, 2, 3, 4], 2, 20)
        await live.aclose()
    with ScoreStore(folder, mode="r") as store:
        replayed: TeacherScorer = ReplayScorer(store, identity)
        return await replayed.score([1, 2, 3, 4], 2, 20)


def serving_a_model(path: str) -> str:
    """A server of one's own, gone at the end of the block."""
    with ServerProcess(ServeConfig(model=path, port=0, max_logprobs=64)) as server:
        return server.url


async def whole_jobs() -> None:
    config = topkd.load_config("run.toml", ["steps=3"])
    assert_type(config, topkd.RunConfig)
    assert_type((await topkd.train(config, Path("runs/a"))).steps, list[dict[str, Any]])
    with topkd.open_store("cache") as store:
        assert_type(store, topkd.ScoreStore)
    async with await topkd.connect("http://127.0.0.1:8000") as teacher:
        assert_type(await teacher.score([1, 2, 3], 0, 20), topkd.TopK)
    report = await topkd.score(topkd.ScoreConfig(data=Path("rows.jsonl"), out=Path("cache"), teachers=("http://a",)))
    assert_type(report.scored, int)
    raise topkd.ConfigError("what", got=1)

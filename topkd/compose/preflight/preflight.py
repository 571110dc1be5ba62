"""Every check that can be made before a model is loaded: one list, for a run and for its dry run.

A run stops at the first problem. A dry run collects all problems.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkd.clients.connection import open_client
from topkd.clients.dialects.base import HttpClient, Wire
from topkd.clients.dialects.records import Dialect, find_dialect, list_dialects
from topkd.compose.config.functions import load_function, load_loss
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import ServerSampling
from topkd.compose.data.prompts import Prompts, check_opens, load_prompts
from topkd.compose.preflight.evaluation import EvalPlan, plan_evaluation
from topkd.compose.preflight.lengths import Ends, check_lengths, check_token_ids_fit, compare_ends, read_vocab_size
from topkd.compose.preflight.teachers import (
    TeacherInfo,
    check_same_ids,
    check_teachers,
    select_teachers,
    shorten_patience,
)
from topkd.compose.progress import Progress
from topkd.engine.models.tokenizer import check_there
from topkd.offline import ReplayScorer, ScoreStore
from topkd.report.load.run_log import flatten_settings
from topkd.topk.errors import ConfigError, TopkdError, UnsupportedError

if TYPE_CHECKING:
    from topkd.compose.cache.contents import RecordedRun
    from topkd.engine.learner.distributed import Ranks

_SYNC_HINTS = {
    "full": "start vLLM with VLLM_SERVER_DEV_MODE=1, or train an adapter: [student.lora]",
    "lora": "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
}
TEACHERS = "teachers.json"  # file in a run's folder with facts about its teacher servers


@dataclass(slots=True)
class Preflight:
    """Checks before a run, and their findings so far.

    Attributes:
        config: Config of the run.
        progress: Shows notes.
        processes: Number of processes of the run (from torchrun).
        is_replay: Whether the run trains from a cache, with no server.
        cache: Folder of a replay's cache; None takes the config's.
        teachers_file: File for facts about the teacher servers, for a resume.
        is_resumed: Whether the run is resumed: a server that describes itself as before is not compared again.
        ranks: The processes that share the run.
        loss: A custom objective's function, if it is already loaded.
        teachers: teacher_id -> facts about its server.
        prompts: Tokenizer and rows.
        evaluation: The measurements of ``[eval]``.
        ends: The tokens that end completions.
        recorded: The rollouts and scores that a replay finds in its cache.
    """

    config: RunConfig
    progress: Progress = field(default_factory=Progress)
    processes: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    is_replay: bool = False
    cache: Path | None = None
    teachers_file: Path | None = None
    is_resumed: bool = False
    ranks: Ranks | None = None
    loss: Callable[..., Any] | None = None
    teachers: dict[str, TeacherInfo] = field(default_factory=dict)
    prompts: Prompts | None = None
    evaluation: EvalPlan | None = None
    ends: Ends | None = None
    recorded: RecordedRun | None = None

    @property
    def loaded_prompts(self) -> Prompts:
        """The prompts; their check must have passed."""
        if self.prompts is None:
            raise ValueError("the prompts have not been read")
        return self.prompts

    @property
    def recorded_run(self) -> RecordedRun:
        """The rollouts and scores in a replay's cache; its check must have passed."""
        if self.recorded is None:
            raise ValueError("the cache has not been read")
        return self.recorded

    def notes(self) -> dict[str, Any]:
        """Return the facts about the data for the run log's first event."""
        prompts = self.loaded_prompts
        data = {"rows": len(prompts.rows), "dropped_overlong": len(prompts.dropped), "dropped": prompts.dropped[:20]}
        ends = self.ends or Ends((), None, {})
        return {"data": data, "stop_token_ids": list(ends.stops), "warnings": list(ends.notes)}


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a run.

    Attributes:
        name: Name of the check, for ``needs``.
        run: Raises a ``TopkdError`` for a problem, and adds its results to the ``Preflight``. A function that is not a
            coroutine reads files, and so runs in a thread.
        needs: Names of checks that must have passed.
        live: Whether a live run makes this check.
        replay: Whether a replay makes this check.
        dry: Whether only a dry run makes it. A run makes it later, before the student is loaded.
    """

    name: str
    run: Callable[[Preflight], Awaitable[None] | None]
    needs: tuple[str, ...] = ()
    live: bool = True
    replay: bool = True
    dry: bool = False

    async def apply(self, state: Preflight) -> None:
        """Run the check; if it reads files, run it in a thread."""
        try:
            if inspect.iscoroutinefunction(self.run):
                await self.run(state)
            else:
                await asyncio.to_thread(self.run, state)
        except TopkdError as error:
            _name_folder(error, state)
            raise


def _name_folder(error: TopkdError, state: Preflight) -> None:
    """If the error is about a missing file, raise it again with the folder at which relative paths start."""
    if _is_missing_file(error, state):
        hint = "; ".join(filter(None, [error.hint, f"a relative path is taken from {Path.cwd()}"]))
        raise type(error)(error.what, where=error.where, got=error.got, expected=error.expected, hint=hint) from error


def _is_missing_file(error: TopkdError, state: Preflight) -> bool:
    """Whether the error names a relative path of the config that does not exist, and not the folder it starts at."""
    named = [value for value in flatten_settings(state.config.model_dump()).values() if isinstance(value, str)]
    named += [str(state.cache)] if state.cache is not None else []
    if not error.where or error.where not in {*named, *map(os.path.normpath, named)} or "is taken from" in error.hint:
        return False
    return not os.path.isabs(error.where) and not os.path.exists(error.where)  # noqa: PTH110, PTH117 - may be no path


async def preflight(state: Preflight) -> Preflight:
    """Make every check of a run; raise the first problem."""
    for check in _select_checks(state):
        if not check.dry:
            await check.apply(state)
    return state


async def collect_problems(state: Preflight) -> list[str]:
    """Run every check and return all problems, one line each."""
    problems: list[str] = []
    failed: set[str] = set()
    for check in _select_checks(state):
        if failed.intersection(check.needs):  # it would find the same problem again
            failed.add(check.name)
            continue
        try:
            await check.apply(state)
        except TopkdError as error:
            failed.add(check.name)
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def check_here(config: RunConfig) -> None:
    """Raise an error if the student's model or a data file is missing on this machine."""
    state = Preflight(config)
    try:
        _check_student(state)
        _check_files(state)
    except TopkdError as error:
        _name_folder(error, state)
        raise


def _select_checks(state: Preflight) -> list[Check]:
    return [check for check in CHECKS if (check.replay if state.is_replay else check.live)]


async def _check_processes(state: Preflight) -> None:
    kind = state.config.sampler.kind
    if state.processes > 1 and not state.is_replay and kind != "in_process":
        raise ConfigError(
            "with several processes, each must sample from the student in its own memory",
            got=f"sampler.kind {kind!r}", expected='sampler.kind = "in_process", or one process',
        )  # fmt: skip
    if state.config.rollout.shards % state.processes:
        raise ConfigError(
            "rollout.shards must be a multiple of the number of processes",
            got=f"{state.config.rollout.shards} shards, {state.processes} processes",
            hint="set a multiple of the number of processes, or 0",
        )


async def _check_schedule(state: Preflight) -> None:
    from topkd.engine.learner.optimizers import check_schedule  # imports torch

    check_schedule(state.config.learner, state.config.steps)


async def _check_packages(state: Preflight) -> None:
    config, track = state.config, state.config.track
    for is_needed, key, package, hint in (
        (track.tensorboard, "track.tensorboard", "tensorboard", "pip install 'topkd[track]'"),
        (track.wandb_project is not None, "track.wandb_project", "wandb", "pip install 'topkd[track]'"),
        (config.student.lora is not None, "[student.lora]", "peft", "pip install 'topkd[train]'"),
        (config.learner.optimizer == "adamw_8bit", 'learner.optimizer = "adamw_8bit"', "bitsandbytes",
         "pip install bitsandbytes"),
    ):  # fmt: skip
        if is_needed:
            _require(package, key, hint)


def _require(package: str, key: str, hint: str = "pip install 'topkd[train]'") -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{key} needs {package}", hint=f"install it with: {hint}")


async def _check_framework(_state: Preflight) -> None:
    for package in ("torch", "transformers"):
        _require(package, "a student")


async def _check_functions(state: Preflight) -> None:
    if state.config.data.feedback is not None:
        load_function(state.config.data.feedback, "data.feedback")
    if state.loss is None:
        load_loss(state.config.objective)


def _check_student(state: Preflight) -> None:
    check_there(state.config.student.model)


def _check_files(state: Preflight) -> None:
    config = state.config
    check_opens(Path(config.data.path))
    if config.eval is not None:
        check_opens(Path(config.eval.path))
        if config.eval.teacher is not None:
            check_there(config.eval.teacher)


def _check_cache(state: Preflight) -> None:
    from topkd.compose.cache.contents import cache_folder, find_recorded_run

    with ScoreStore(cache_folder(state.config, state.cache)) as store:
        state.recorded = find_recorded_run(store, state.config)


async def _check_teachers(state: Preflight) -> None:
    if state.ranks is None or state.ranks.main:
        state.teachers = await check_teachers(
            state.config, state.progress, state.teachers_file, resumed=state.is_resumed
        )
    if state.ranks is not None:
        state.teachers = await asyncio.to_thread(state.ranks.first, state.teachers)


async def _check_support(state: Preflight) -> None:
    """Check that every teacher can score chosen ids, if ``objective.support`` needs them; a cache cannot."""
    support = state.config.objective.list_support
    if support == "teacher":
        return
    able = " or ".join(list_dialects(candidates=True)[1:])
    for name, table in select_teachers(state.config).items():
        info = state.teachers.get(name)
        if state.is_replay:
            got = "a cache"
        elif table.kind == "self":
            got = 'kind "self"'
        elif info is not None and not find_dialect(info.dialect).candidates:
            got = f"dialect {info.dialect}"
        else:
            continue
        raise ConfigError(
            f"objective.support = {support!r} needs a teacher that scores chosen ids",
            where=" ".join(filter(None, [f"teacher {name!r}" if name else "", "" if info is None else info.url])),
            got=got, expected=f'kind "local", or a server of dialect {able}',
            hint='or set objective.support = "teacher"',
        )  # fmt: skip


def _check_local_teachers(state: Preflight) -> None:
    for teacher in select_teachers(state.config).values():
        if teacher.kind == "local" and teacher.model is not None:
            check_there(teacher.model)
            check_same_ids(teacher.model, state.config.student.model)


def require_weight_sync(client: HttpClient) -> Dialect:
    """Return the dialect of a student's server; refuse one whose weights cannot be changed."""
    dialect = find_dialect(client.dialect)
    if not dialect.syncs:
        raise UnsupportedError(
            "this server's weights cannot be changed, so it cannot sample a student that is trained",
            where=client.where(), got=f"dialect {client.dialect}", expected="vLLM, SGLang or topkd serve",
        )  # fmt: skip
    return dialect


async def check_sampler(config: RunConfig) -> str:
    """Check the server of ``[sampler]`` and describe it in a line; return "" if the sampler is in this process.

    Raises:
        ServerUnreachableError, ModelNotFoundError: The server does not answer, or does not have the model.
        UnsupportedError: The server cannot load new weights.
    """
    table = config.sampler
    if not isinstance(table, ServerSampling):
        return ""
    by_adapter = table.weights == "lora" or (table.weights == "auto" and config.student.lora is not None)
    async with await open_client(
        table.url,
        dialect=table.dialect,
        model=table.model,
        api_key=table.api_key(),
        config=shorten_patience(config.client),
    ) as client:
        info, dialect = await client.server_info(), require_weight_sync(client)
        wire, way = Wire(client), "lora" if by_adapter else "full"
        missing = [route for route in dialect.load_sink().routes[way] if not await wire.mounted(route)]
        if missing:
            raise UnsupportedError(
                "the student's server cannot load " + ("adapters" if by_adapter else "new weights"),
                where=client.where(), got=f"no route {missing[0]}", hint=_SYNC_HINTS[way],
            )  # fmt: skip
        how = "as adapters" if by_adapter else "as whole models"
        return f"the student is sampled at {table.url} ({info.model}, {client.dialect}), new weights are sent {how}"


async def _check_sampler(state: Preflight) -> None:
    if note := await check_sampler(state.config):
        state.progress.note(note)


async def _check_prompts(state: Preflight) -> None:
    state.prompts = load_prompts(state.config, state.progress)


async def _check_ids(state: Preflight) -> None:
    size = read_vocab_size(state.config.student.model)
    if size is not None:
        check_token_ids_fit(state.config, state.loaded_prompts.rows, size)


async def _check_lengths(state: Preflight) -> None:
    config = state.config
    if state.is_replay and config.replay.order == "shuffled":  # the completions exist, with any length
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_completion_tokens": 1})})
    check_lengths(config, state.loaded_prompts, state.teachers)


async def _check_mixture(state: Preflight) -> None:
    from topkd.engine.loop.data_mixing import check_mixture  # imports torch

    check_mixture(state.config, state.loaded_prompts.rows)


async def _check_ends(state: Preflight) -> None:
    state.ends = compare_ends(state.config, state.loaded_prompts)
    for note in state.ends.notes:
        state.progress.note(f"note: {note}")


async def _check_evaluation(state: Preflight) -> None:
    table, config = state.config.eval, state.config
    if table is not None:
        local = {name for name, teacher in config.teacher_map().items() if teacher.kind != "server"}
        state.evaluation = plan_evaluation(
            config, table, state.loaded_prompts.readers, set() if state.is_replay else local
        )


def _check_draws(state: Preflight) -> None:
    from topkd.compose.cache.contents import cache_folder
    from topkd.compose.cache.shuffled import ShuffledRollouts

    if state.config.replay.order != "shuffled":
        return
    with ScoreStore(cache_folder(state.config, state.cache)) as store:
        teachers = {name: ReplayScorer(store, identity) for name, identity in state.recorded_run.teachers.items()}
        ShuffledRollouts(
            store, state.recorded_run.policy, state.loaded_prompts.rows, teachers=teachers, config=state.config,
            progress=state.progress,
        )  # fmt: skip


CHECKS = (
    Check("framework", _check_framework),
    Check("processes", _check_processes),
    Check("packages", _check_packages),
    Check("functions", _check_functions),
    Check("cache", _check_cache, live=False),
    Check("student", _check_student),
    Check("files", _check_files),
    Check("schedule", _check_schedule, needs=("framework",)),
    Check("teachers", _check_teachers, needs=("student",), replay=False),
    Check("support", _check_support, needs=("teachers",)),
    Check("local teachers", _check_local_teachers, needs=("student",), replay=False),
    Check("sampler", _check_sampler, replay=False),
    Check("prompts", _check_prompts, needs=("student", "files")),
    Check("ids", _check_ids, needs=("prompts",)),
    Check("lengths", _check_lengths, needs=("prompts",)),
    Check("mixture", _check_mixture, needs=("prompts",)),
    Check("ends", _check_ends, needs=("prompts",)),
    Check("evaluation", _check_evaluation, needs=("prompts", "files")),
    Check("draws", _check_draws, needs=("cache", "prompts"), live=False, dry=True),
)

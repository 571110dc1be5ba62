"""The config of a comparison: its arms, seeds, base, and the tuning of learning rates."""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PositiveInt, field_validator, model_validator

from topkd.compose.config.functions import load_loss
from topkd.compose.config.overrides import apply_override, merge_settings, parse_value, put_value
from topkd.compose.config.run_config import RunConfig, read_toml, validate_config
from topkd.engine import EngineConfig
from topkd.engine.config.learner import Frozen
from topkd.topk.errors import ConfigError

Seed: TypeAlias = Annotated[int, Field(ge=0)]
EMBEDDED = "embedded"
NAME_LENGTH = 60
SEEDS = [0, 1, 2]  # the default


class Arm(Frozen):
    """One way to train: the settings that differ from the base.

    Attributes:
        name: Name in folders and files.
        label: Name that people read; by default ``name``.
        set: The settings that differ from the base.
        control: Whether the arm is only a yardstick, such as one that needs the teacher's whole distribution. It is
            trained and shown like the others, and compared with the best of them, but cannot win.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=+-]*$", max_length=NAME_LENGTH)]
    label: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    control: bool = False

    @property
    def display_name(self) -> str:
        """Return the label, or the name if there is none."""
        return self.label or self.name


class Tuning(Frozen):
    """Learning rates to try on other seeds (and so on other prompts), with equally many trials for every arm.

    If an arm's best rate is the first or the last of the grid, the grid gets one more rate there, for every arm, up to
    ``extensions`` times. If it is still the first or the last then, the comparison has no verdict.
    """

    rates: Annotated[tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...], Field(min_length=3)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    extensions: Annotated[int, Field(ge=0)] = 2

    @field_validator("rates")
    @classmethod
    def _ascending(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if list(rates) != sorted(set(rates)):
            raise ValueError("rates in ascending order, each once")
        return rates


class CompareConfig(Frozen):
    """A comparison: every arm on every seed, from the same weights and prompts.

    Attributes:
        name: Name on the report page.
        note: One sentence on what the comparison can and cannot show, beside the verdict.
        base: "embedded" (the demo's tiny pair, its teacher in this process) or a run file.
        overrides: Settings that replace the base's for every arm.
        arms: The ways to train; the first one is the reference of all ratios.
        seeds: Seeds on which every arm is trained; statistics are paired over them.
        tuning: How to choose each arm's learning rate; None keeps the base's.
        metric: Evaluation field by which arms are judged; lower is better.
        target: Share of the metric's first value that counts as the target in "tokens to target".
        replay: Whether to train every arm also on the rollouts of the reference arm's live run: an off-policy test
            of the estimators, reported separately.
        workers: Number of processes; 0 takes one per core.
    """

    name: str = "comparison"
    note: str = ""
    base: str = EMBEDDED
    overrides: dict[str, Any] = Field(default_factory=dict)
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    tuning: Tuning | None = None
    metric: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    target: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    replay: bool = False
    workers: Annotated[int, Field(ge=0)] = 0
    probes: PositiveInt = 48

    @model_validator(mode="after")
    def _distinct(self) -> CompareConfig:
        names, labels = [arm.name for arm in self.arms], [arm.display_name for arm in self.arms]
        for what, values in (
            ("arm's name", names),
            ("arm's label", labels),
            ("seed", [str(item) for item in self.seeds]),
        ):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"every {what} must be unique, but {twice[0]!r} comes {values.count(twice[0])} times")
        if self.tuning is not None and (shared := set(self.tuning.seeds) & set(self.seeds)):
            raise ValueError(f"tuning seeds must differ from the comparison's seeds (both hold {sorted(shared)})")
        return self

    def values(self, arm: Arm, seed: int, lr: float | None) -> dict[str, Any]:
        """Merge the settings of one cell, as plain values: base, overrides, arm, seed, rate."""
        values = self._base_values()
        for source in (self.overrides, arm.set):
            values = merge_settings(values, source, RunConfig)
        values["seed"] = seed
        if lr is not None:
            values["learner"] = {**values.get("learner", {}), "lr": lr}
        return values

    def checked(self) -> CompareConfig:
        """Validate the settings of every arm, before any run starts."""
        if self.replay and self.base != EMBEDDED:
            raise ConfigError(
                "only a comparison on the embedded pair can replay rollouts", where=self.base, got="replay = true",
                hint="remove it, or record the run in a [cache] and use topkd replay",
            )  # fmt: skip
        self._check_own()
        first: RunConfig | None = None
        for arm in self.arms:
            values = self.values(arm, self.seeds[0], None)
            model = EngineConfig if self.base == EMBEDDED else RunConfig
            config = validate_config(model, values, where=f"arm {arm.name!r}")
            load_loss(config.objective)
            if isinstance(config, RunConfig):
                self._check_measured(arm, config)
                first = first or config
                _check_alike(arm, _select_shared(config), self.arms[0], _select_shared(first))
            if config.max_staleness and not self.replay:
                raise ConfigError(
                    "a comparison trains on-policy", where=f"arm {arm.name!r}",
                    got=f"max_staleness {config.max_staleness}", expected="0",
                    hint="set overrides.max_staleness = 0: staleness differs in effect between estimators",
                )  # fmt: skip
        return self

    def _check_measured(self, arm: Arm, config: RunConfig) -> None:
        table, teachers = config.eval, config.teacher_map().values()
        if table is None or "fixed" not in table.prefixes or not (
            table.teacher is not None or (teachers and all(teacher.kind != "server" for teacher in teachers))
        ):  # fmt: skip
            raise ConfigError(
                f"nothing measures {self.metric}, by which arms are judged", where=f"arm {arm.name!r}",
                got="no [eval]" if table is None else f"eval.teacher {table.teacher!r}, prefixes {[*table.prefixes]}",
                expected='an [eval] with "fixed" among its prefixes, and the teacher\'s folder as eval.teacher',
            )  # fmt: skip

    def _check_own(self) -> None:
        """Refuse settings that the comparison itself sets for every arm: they would be ignored without notice."""
        sources = [("overrides", self.overrides), *((f"arm {arm.name!r}", arm.set) for arm in self.arms)]
        for where, table in sources:
            if "seed" in table:
                raise ConfigError(
                    "an arm cannot have its own seed: every arm is trained on every seed", where=where,
                    got=f"seed = {table['seed']!r}",
                    hint="remove it; set the seeds with seeds = [0, 1], or with --seeds 0,1",
                )  # fmt: skip
            learner = table.get("learner")
            if self.tuning is not None and isinstance(learner, Mapping) and "lr" in learner:
                raise ConfigError(
                    "an arm cannot have its own learning rate: [tuning] chooses one for every arm", where=where,
                    got=f"learner.lr = {learner['lr']!r}", hint="remove one of the two",
                )  # fmt: skip

    def _base_values(self) -> dict[str, Any]:
        if self.base == EMBEDDED:
            return dict(EMBEDDED_VALUES)
        values = read_toml(Path(self.base))
        values.setdefault("max_staleness", 0)
        return values


def _select_shared(config: RunConfig) -> dict[str, Any]:
    """Select the settings that paired runs must share: student, prompts and evaluation."""
    measured = {} if config.eval is None else config.eval.model_dump(mode="json")
    if measured.get("teacher") is None:
        measured["teacher"] = {name: item.model for name, item in config.teacher_map().items()}
    return {
        "student.model": config.student.model,
        "data.path": config.data.path,
        "data.limit": config.data.limit,
        **{f"eval.{key}": value for key, value in measured.items()},
    }


def _check_alike(arm: Arm, ours: Mapping[str, Any], first: Arm, first_values: Mapping[str, Any]) -> None:
    if differing := [key for key in first_values if ours.get(key) != first_values[key]]:
        key = differing[0]
        raise ConfigError(
            f"arms that differ in {key} cannot be paired", where=f"arm {arm.name!r}", got=repr(ours.get(key)),
            expected=f"{first_values[key]!r}, as arm {first.name!r} has it",
            hint="one student, one [data] path and one [eval] for all arms; or run a separate comparison for each",
        )  # fmt: skip


# The demo's pair with small steps, so that many runs can finish: 16 prompts x 24 tokens per step, every token valid.
EMBEDDED_VALUES: dict[str, Any] = {
    "steps": 60,
    "k": 20,
    "max_staleness": 0,
    "eval_every": 10,
    "rollout": {"prompts_per_step": 16, "samples_per_prompt": 1, "max_completion_tokens": 24, "batch_size": 16},
    "learner": {"lr": 1e-3, "warmup_steps": 5},
    "checkpoint": {"every": 0},  # a stopped cell runs again, which takes seconds
}


def load_compare(path: str | Path, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> CompareConfig:
    """Read a comparison file; a relative ``base`` starts at the file's folder.

    Args:
        path: The comparison file.
        overrides: ``key=value``, applied to every arm.
        seeds: Seeds that replace the file's.
    """
    path = Path(path)
    values = {"seeds": SEEDS, **read_toml(path)}
    if seeds is not None:
        values["seeds"] = list(seeds)
    if isinstance(base := values.get("base"), str) and base != EMBEDDED:
        values["base"] = str(path.parent / base)
    config = validate_config(CompareConfig, values, where=str(path))
    return _apply_overrides(config, overrides).checked()


def from_runs(
    paths: Sequence[Path], grid: Mapping[str, Sequence[Any]], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> CompareConfig:
    """Build arms from run files (``compare a.toml b.toml``), or from a grid over one base file or the embedded pair."""
    if grid and len(paths) > 1:
        raise ConfigError("a grid takes one base file", got=f"{len(paths)} files", hint="give one, or drop --grid")
    if len(paths) > 1:
        base = read_toml(paths[0])
        arms = [_build_arm(_make_unique(path, paths), _diff_runs(base, path)) for path in paths]
        values: dict[str, Any] = {"base": str(paths[0]), "name": " against ".join(arm.name for arm in arms)}
    else:
        arms = [_build_grid_arm(dict(zip(grid, point, strict=True))) for point in itertools.product(*grid.values())]
        if len(arms) < 2:
            raise ConfigError(
                "a comparison needs at least two arms",
                where="--grid",
                got=arms[0].display_name,
                hint="as in objective.kind=gjs,topk_pg",
            )
        values = {"base": str(paths[0]) if paths else EMBEDDED, "name": "grid over " + ", ".join(grid)}
    values |= {"arms": [arm.model_dump() for arm in arms], "seeds": list(seeds)}
    return _apply_overrides(validate_config(CompareConfig, values, where="the command line"), overrides).checked()


def parse_grid(entries: Sequence[str]) -> dict[str, list[Any]]:
    """Parse ``key=value,value`` options as key -> values."""
    grid: dict[str, list[Any]] = {}
    for entry in entries:
        key, separator, text = entry.partition("=")
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not separator or not key.strip() or not parts:
            raise ConfigError("--grid takes key=value,value", got=entry, hint="as in --grid objective.kind=gjs,topk_pg")
        grid.setdefault(key.strip(), []).extend(parse_value(part) for part in parts)
    return grid


def _build_grid_arm(point: Mapping[str, Any]) -> Arm:
    table: dict[str, Any] = {}
    for key, value in point.items():
        put_value(table, key, value, source="--grid")
    return _build_arm("+".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items()), table)


def _build_arm(label: str, table: dict[str, Any]) -> Arm:
    """Build an arm with a name that can be a folder's, and with the label that was typed."""
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", label).lstrip("_.=+-")
    if not name or len(name) > NAME_LENGTH:  # arms differ mostly at the end; the digest is for the rest
        digest = hashlib.blake2b(label.encode(), digest_size=4).hexdigest()
        name = f"{digest}-{name[9 - NAME_LENGTH :]}".rstrip("-")
    return Arm(name=name, label="" if name == label else label, set=table)


def _apply_overrides(config: CompareConfig, overrides: Sequence[str]) -> CompareConfig:
    table = copy.deepcopy(config.overrides)
    for override in overrides:
        apply_override(table, override)
    return config.model_copy(update={"overrides": table})


def _diff_runs(base: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings that turn the first file's run into another's, with defaults for keys that it lacks."""
    other = read_toml(path)
    if gone := sorted(set(base) - set(other)):
        raise ConfigError(
            "only the first run file has this table", got=gone[0],
            hint="give every file the same tables, or write a comparison file with arms",
        )  # fmt: skip
    whole = validate_config(RunConfig, other, where=str(path)).model_dump(mode="json")
    differing = {key: value for key, value in other.items() if value != base.get(key)}
    return {key: _list_explicit(value, base.get(key), whole.get(key)) for key, value in differing.items()}


def _list_explicit(value: Any, former: Any, whole: Any) -> Any:
    if not (isinstance(value, Mapping) and isinstance(former, Mapping) and isinstance(whole, Mapping)):
        return value
    made = {key: whole[key] for key in former if key not in value and key in whole}
    return made | {key: _list_explicit(entry, former.get(key), whole.get(key)) for key, entry in value.items()}


def _make_unique(path: Path, paths: Sequence[Path]) -> str:
    same = [other for other in paths if other.stem == path.stem]
    return path.stem if len(same) == 1 else f"{path.resolve().parent.name}-{path.stem}"

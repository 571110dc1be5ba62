"""The content of the page: everything that its script draws, as one value for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from topkd.report.analysis.tables import (
    Table,
    build_comparison_tables,
    build_runs_table,
    build_settings_table,
    build_summary_table,
)
from topkd.report.analysis.verdict import EMBEDDED, OF_TEXT, ReportVerdict, write_verdict
from topkd.report.load.collection import Collection, RunGroup
from topkd.report.load.columns import AXES, compute_step_axes, list_prefix_kinds
from topkd.report.load.run_folder import DEMO
from topkd.report.load.run_log import LoggedRun, Record, StoredRollout, find_last_step, read_object
from topkd.report.page.measurements import list_by_prefixes, list_training
from topkd.report.page.palette import DASHES, GROUPS
from topkd.report.page.panels import EXACT_DIVERGENCES, SECTIONS, Section
from topkd.report.page.series import Downsampling, build_panel_series, build_ratio_histogram
from topkd.report.page.strip_charts import list_measures
from topkd.report.page.token_explorer import TranscriptFile, select_transcripts
from topkd.topk.errors import DataError

_PROMPT_CHARS, _TEXT_CHARS = 400, 800


@dataclass(frozen=True, slots=True)
class Page:
    """A page's content, before it becomes HTML."""

    title: str
    groups: list[RunGroup]
    verdict: ReportVerdict
    summary: Table
    more: list[Table]
    runs: Table
    settings: Table
    transcripts: TranscriptFile
    completions: list[ExampleCompletion]
    completions_of: str
    data: dict[str, Any]
    notes: list[str]


def build_content(collection: Collection, *, live: bool = False, baseline: Mapping[str, Any] | None = None) -> Page:
    """Build the content of the page about a collection."""
    groups = collection.groups()
    statement, outcomes = write_verdict(collection, groups)
    downsampled = Downsampling()
    kinds = list_prefix_kinds(groups) or ["fixed"]
    sections = [_build_section(section, groups, downsampled, kinds) for section in SECTIONS]
    if collection.comparison.get("base") == EMBEDDED:
        for panel in (panel for section in sections for panel in section["panels"] if panel["key"] == "accuracy"):
            note = "How often the next token of held-out text is the student's most likely token."
            panel |= {"title": OF_TEXT, "unit": "% of tokens", "note": note}
    _relabel_log_ratio(sections, [group for group in groups if not group.replayed])
    recorded = select_transcripts(groups)
    smoothing, colours = _describe_smoothing(downsampled), _describe_colours(groups)
    notes = [*filter(None, (*statement.notes, downsampled.describe(), smoothing, recorded.note, colours))]
    data = {
        "live": live,
        "title": collection.title,
        "state": _describe_state(collection),
        "groups": [{"label": group.label, "n": len(group.runs), "apart": group.replayed} for group in groups],
        "axes": _list_axes(groups),
        "prefixes": kinds,
        "sections": sections,
        "metric": statement.metric,
        "ranks": [rank.to_json() for rank in statement.ranks],
        "seeds": [asdict(measure) for measure in list_measures(collection, groups, statement.ranks, statement.metric)],
        "comparison": collection.comparison,
        "rollouts": recorded.heads,
    }
    return Page(
        collection.title,
        groups,
        statement,
        build_summary_table(groups, outcomes, statement),
        [*build_comparison_tables(collection.comparison), *_build_measured_tables(groups, statement)],
        build_runs_table(groups, outcomes),
        build_settings_table(collection, groups, baseline),
        recorded,
        *_find_completions(groups, statement),
        data,
        notes,
    )


def _find_completions(groups: Sequence[RunGroup], statement: ReportVerdict) -> tuple[list[ExampleCompletion], str]:
    """Find texts that a student wrote, from the best setting that recorded some; return them, and the run's name."""
    order = dict.fromkeys([*(rank.group for rank in statement.ranks), *range(len(groups))])
    runs = [run for index in order for run in groups[index].runs if not run.replayed]
    for run in runs:
        if texts := read_completions(run):
            return texts, run.name if len(runs) > 1 else ""
    return [], ""


@dataclass(frozen=True, slots=True)
class ExampleCompletion:
    """A completion that a model wrote, with its prompt and a title."""

    title: str
    prompt: str
    text: str


def read_completions(run: LoggedRun) -> list[ExampleCompletion]:
    """Read the first and the last text of the student; return none if none was recorded, or it wrote none itself."""
    if (run.path / DEMO).exists():
        try:
            return _read_demo(read_object(run.path / DEMO))
        except DataError:  # empty until the demo ends
            return []
    rollouts = [rollout for rollout in run.rollouts if isinstance(rollout.step, int)]
    if run.foreign or not rollouts:
        return []
    first, last = _choose_pair(rollouts)
    return [_build_completion(rollout.read()) for rollout in ([first] if first.step == last.step else [first, last])]


def _read_demo(summary: Record) -> list[ExampleCompletion]:
    titles = {
        "student before": "Student, before training",
        "student after": "Student, after training",
        "teacher": "Teacher",
    }
    prompt = str(summary.get("prompt", ""))
    return [ExampleCompletion(title, prompt, str(summary[key])) for key, title in titles.items() if key in summary]


def _choose_pair(rollouts: Sequence[StoredRollout]) -> tuple[StoredRollout, StoredRollout]:
    """Choose a rollout of the first and of the last recorded step; for the same prompt, if both steps have one."""
    firsts = [rollout for rollout in rollouts if rollout.step == rollouts[0].step]
    lasts = [rollout for rollout in rollouts if rollout.step == rollouts[-1].step]
    pairs = ((first, last) for first in firsts for last in lasts if first.prompt == last.prompt)
    return next(pairs, (firsts[0], lasts[-1]))


def _build_completion(rollout: Record) -> ExampleCompletion:
    prompt = str(rollout.get("prompt", ""))
    text = "".join(str(token.get("text", "")) for token in rollout["tokens"] if isinstance(token, dict))
    cut = "…" if len(text) > _TEXT_CHARS or rollout.get("left_out") else ""
    return ExampleCompletion(
        f"Student, at step {rollout['step']}",
        f"…{prompt[-_PROMPT_CHARS:]}" if len(prompt) > _PROMPT_CHARS else prompt,
        text[:_TEXT_CHARS] + cut,
    )


def _build_measured_tables(groups: Sequence[RunGroup], statement: ReportVerdict) -> list[Table]:
    """Build tables of the measurements of settings that ran on-policy, best first."""
    order = [rank.group for rank in statement.ranks] or [i for i, group in enumerate(groups) if not group.replayed]
    return [table for table in (list_by_prefixes(groups, order), list_training(groups, order)) if table is not None]


def _build_section(
    section: Section, groups: Sequence[RunGroup], downsampled: Downsampling, kinds: Sequence[str]
) -> dict[str, Any]:
    drawn: list[dict[str, Any]] = []
    absent: list[str] = []
    for panel in section.panels:
        if panel.source == "eval":
            lines = {kind: found for kind in kinds if (found := build_panel_series(panel, groups, downsampled, kind))}
        else:
            found = build_panel_series(panel, groups, downsampled)
            lines = {"": found} if found else {}
        if lines:
            head = {name: getattr(panel, name) for name in ("key", "title", "unit", "note", "log")} | {"zero": None}
            drawn.append({**head, "kind": "line", "lines": lines, "constant": _is_constant(lines)})
        elif not panel.special:
            absent.append(f"{panel.title} ({' or '.join(panel.fields)})")
    _share_zero_scale(drawn, groups)
    if section.key == "offpolicy":
        if (bins := build_ratio_histogram(groups)) is not None:
            drawn.insert(0, _RATIOS | bins)
        else:
            absent.insert(0, "Importance ratios (ratio_hist)")
    return {"key": section.key, "title": section.title, "text": section.text, "panels": drawn, "absent": absent}


def _is_constant(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Return whether all lines of a panel have one and the same value at several steps."""
    values = [[y for y in line["y"] if y is not None] for kind in lines.values() for line in kind]
    return all(len(ys) > 1 for ys in values) and len({y for ys in values for y in ys}) == 1


def _relabel_log_ratio(sections: Sequence[dict[str, Any]], groups: Sequence[RunGroup]) -> None:
    """Relabel the panel of log s - log t if a student learnt from completions that it did not sample."""
    foreign = [group.label for group in groups if group.foreign]
    for panel in (panel for section in sections for panel in section["panels"] if panel["key"] == "kl_k1" and foreign):
        panel["title"] = "Mean log S/T on the completions of a step"
        if len(foreign) == len(groups):
            panel["note"] = f"No estimate of KL(S ‖ T): {_UNDRAWN}."
        else:
            panel["note"] = f"An estimate of KL(S ‖ T), but not for {', '.join(foreign)}: {_UNDRAWN}."


_UNDRAWN = "the trained student did not sample these completions"


def _share_zero_scale(drawn: Sequence[dict[str, Any]], groups: Sequence[RunGroup]) -> None:
    """Let the axes of exact divergences begin at zero: all of them if one line comes near zero, else none."""
    exact = [panel for panel in drawn if panel["key"] in EXACT_DIVERGENCES]
    ends = [
        (min(known), max(known))
        for panel in exact
        for lines in panel["lines"].values()
        if (known := [y for line in lines if not groups[line["g"]].replayed for y in line["y"] if y is not None])
    ]
    for panel in exact:
        panel["zero"] = any(low < _NEAR_ZERO * high for low, high in ends)


_NEAR_ZERO = 0.6  # zero is shown if the lowest value is below this share of the highest (the same as in scales.js)
_RATIOS = {
    "key": "ratio_hist",
    "kind": "hist",
    "title": "Importance ratios",
    "unit": "% of tokens, all steps",
    "note": "New probability of each sampled token, divided by that at sampling; 1 is on-policy. Equal bins in log₂.",
    "log": False,
    "zero": True,
}


def _list_axes(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """List every choice of x, and whether all runs have it."""
    tables = [compute_step_axes(run) for group in groups for run in group.runs if run.steps]
    available = {key: bool(tables) and all(key in table for table in tables) for key, *_ in AXES}
    return [{"key": key, "label": label, "unit": unit, "ok": available[key]} for key, label, unit in AXES]


def _describe_state(collection: Collection) -> dict[str, Any]:
    states = [run.state for run in collection.runs]
    only_run = collection.runs[0] if len(states) == 1 else None
    return {
        "running": sum(state == "running" for state in states),
        "steps": max(find_last_step(run.steps) for run in collection.runs),
        "text": f"{only_run.state}, step {find_last_step(only_run.steps):,} of {only_run.planned or '?'}"
        if only_run
        else ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
    }


def _describe_smoothing(downsampled: Downsampling) -> str:
    if not downsampled.windows:
        return ""
    widths = " or ".join(str(width) for width in sorted(downsampled.windows))
    return f"Bold lines of noisy series are centred means over {widths} steps; the thin lines show the values."


def _describe_colours(groups: Sequence[RunGroup]) -> str:
    styles = len(GROUPS["light"]) * len(DASHES)
    if len(groups) <= styles:
        return ""
    return f"{len(groups)} settings share {styles} line styles: hide some in the legend to distinguish the rest."

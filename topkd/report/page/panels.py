"""The panels of the page: the run log field that each shows, its unit, and its section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from topkd.report.load.columns import Floats, find_first_name, has_column, read_column
from topkd.report.load.run_log import Record
from topkd.report.page.downsampling import choose_window, compute_rolling_mean

Source = Literal["step", "eval"]


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart.

    Attributes:
        key: Unique name; also the anchor on the page.
        title: Name of the values that are drawn.
        unit: Unit of the y axis.
        fields: Names in the run log; the first one that a run has is drawn.
        source: The kind of records that have the field.
        note: One sentence on how to read the panel.
        log: Whether y may be switched to a logarithmic axis.
        share: Whether values are shares of one, shown in per cent.
        total: Whether values are counts of a step, drawn as running totals.
        per: Field to divide by (a count becomes a rate).
        per_fields: The names among ``fields`` to divide; the others are already rates.
        over: Numerator and denominator fields. Their rolling means are divided: the ratio of one step says little.
        smooth: Whether to draw a rolling mean. False for schedules, and where single steps matter (waiting times).
        special: Whether only some runs have the panel. If it is absent, the report does not list it as missing.
    """

    key: str
    title: str
    unit: str
    fields: tuple[str, ...]
    source: Source = "step"
    note: str = ""
    log: bool = False
    share: bool = False
    total: bool = False
    per: str = ""
    per_fields: tuple[str, ...] = ()
    over: tuple[str, str] | None = None
    smooth: bool = True
    special: bool = False

    def values(self, records: Sequence[Record]) -> Floats | None:
        """Compute the panel's y values from records of its source; None if they do not have the field."""
        name = find_first_name(records, self.fields)
        if name is None:
            return None
        values = read_column(records, name)
        if self.per and name in self.per_fields:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.where(read_column(records, self.per) > 0, values / read_column(records, self.per), np.nan)
        if self.share:
            values = 100.0 * values
        return np.cumsum(values) if self.total else values

    def smoothed(self, records: Sequence[Record], values: Floats, window: int) -> Floats:
        """Compute the rolling mean; for ``over``, the ratio of rolling means (NaN unless the denominator is > 0)."""
        if self.over is None or not all(has_column(records, name) for name in self.over):
            return compute_rolling_mean(values, window)
        above, below = (compute_rolling_mean(read_column(records, name), window) for name in self.over)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(below > 0.0, above / below, np.nan)

    def window(self, size: int) -> int:
        """Return the number of steps in a rolling mean; 1 if the panel is not smoothed."""
        if self.source == "eval" or self.total or not self.smooth:
            return 1
        return choose_window(size) if self.over is None else max(9, choose_window(size))


@dataclass(frozen=True, slots=True)
class Section:
    """Panels under one heading."""

    key: str
    title: str
    text: str
    panels: tuple[Panel, ...]


NATS: Final = "nats per token"
_KL_NOTE = "Exact on held-out prefixes, over the whole vocabulary."

EXACT_DIVERGENCES: Final = ("reverse_kl", "forward_kl", "jsd")

SECTIONS: Final = (
    Section(
        "distance",
        "Distance to the teacher",
        "Lower is better for divergences, higher for agreement and accuracy. A zigzag at an axis means: it does not "
        "begin at zero.",
        (
            Panel("reverse_kl", "KL(student ‖ teacher)", NATS, ("reverse_kl",), "eval", _KL_NOTE, log=True),
            Panel("forward_kl", "KL(teacher ‖ student)", NATS, ("forward_kl",), "eval", _KL_NOTE, log=True),
            Panel("jsd", "Jensen-Shannon divergence", NATS, ("jsd",), "eval", "At most log 2 = 0.693.", log=True),
            Panel("agreement", "Same most likely token", "% of positions", ("agreement",), "eval", share=True),
            Panel("accuracy", "Task accuracy", "% of answers", ("accuracy",), "eval", share=True),
            Panel(
                "kl_k1", "KL(S ‖ T) estimated on fresh rollouts", NATS, ("kl_k1",), log=True,
                note="Mean of log s − log t over the sampled tokens of a step: unbiased, and noisy.",
            ),
            Panel("sft_loss", "−log p of the data", NATS, ("sft_loss",), log=True, special=True,
                  note="Measured on completions from the data, before each step."),
            Panel("divergence_bucket", "Divergence on the lists", NATS, ("divergence_bucket",), log=True, special=True,
                  note="Over K + 1 bins, on a step's completions: a lower bound of the objective's own divergence."),
        ),
    ),
    Section(
        "gradient",
        "Gradient",
        "How large and how noisy the gradient of each step is.",
        (
            Panel(
                "effective_coefficient", "Effective coefficient", "", ("effective_coefficient",),
                note="Mean weight of a token's gradient; 1 is plain on-policy reverse KL.",
            ),
            Panel("grad_noise", "Gradient noise scale", "tokens", ("grad_noise",), log=True,
                  over=("grad_noise_trace", "grad_signal"),
                  note="The batch at which noise and signal are equal: mean noise over mean signal of many steps."),
            Panel("grad_norm", "Gradient norm", "before clipping", ("grad_norm",), log=True),
            Panel("advantage", "Mean |advantage|", "nats", ("advantage_abs_mean",)),
            Panel("lr", "Learning rate", "", ("lr",), log=True, smooth=False),
        ),
    ),
    Section(
        "offpolicy",
        "Off-policy",
        "How far the trained student is from the policy that sampled.",
        (
            Panel("ess", "Effective sample size", "% of tokens", ("ess",), share=True,
                  note="(Σw)² / nΣw² of the importance ratios; 100 % is on-policy."),
            Panel("clip_fraction", "Ratios clipped or truncated", "% of tokens", ("clip_fraction", "ratio_capped"),
                  share=True),
            Panel("ratio_max", "Largest importance ratio", "", ("ratio_max",), log=True),
            Panel("staleness", "Staleness", "weight versions", ("staleness",), smooth=False,
                  note="Versions between the policy that sampled a batch and the one that is trained on it."),
            Panel("behavior_kl", "KL(rollout policy ‖ current)", NATS, ("behavior_kl_k3",), log=True),
            Panel("mismatch_kl", "KL(sampler ‖ trainer), same weights", NATS, ("mismatch_kl",), log=True, smooth=False,
                  note="Above rounding errors, the two compute different probabilities from the same weights. Measured "
                  "only if both have these weights: if sampling runs ahead, in the first step only."),
            Panel("sync_kl", "KL after new weights were sent", NATS, ("sync_kl",), log=True, special=True),
        ),
    ),
    Section(
        "lists",
        "The teacher's lists",
        "How much of the teacher's distribution its top-K lists hold.",
        (
            Panel("missing_mass", "Missing mass", "% of tokens", ("missing_mass",), share=True,
                  note="Sampled tokens that are masked: their position has no signal, or no teacher logprob."),
            Panel("tail_mass", "Tail mass", "% of probability", ("tail_mass",), share=True,
                  note="The teacher's probability outside its own top-K list."),
            Panel("topk_overlap", "Top-K overlap", "% of ids", ("topk_overlap",), share=True,
                  note="Ids of the teacher's list that are also in the student's list."),
            Panel("realised", "Sampled token in the list", "% of tokens", ("realised_in_topk",), share=True),
            Panel("entropy_lo", "Teacher entropy, lower bound", NATS, ("entropy_lo",)),
            Panel("entropy_hi", "Teacher entropy, upper bound", NATS, ("entropy_hi",)),
        ),
    ),
    Section(
        "lengths",
        "Lengths and ends",
        "If a student learns to write too much, or to stop at once, it shows here first.",
        (
            Panel("length", "Completion length", "tokens", ("length_mean", "completion_tokens"), per="samples",
                  per_fields=("completion_tokens",)),
            Panel("truncation", "Cut at the length limit", "% of completions", ("truncation_rate", "truncated"),
                  share=True, per="samples", per_fields=("truncated",)),
            Panel("eos", "Probability of ending", "% per token", ("eos_probability",), share=True),
        ),
    ),
    Section(
        "cost",
        "Cost",
        "Requests to the teacher, as totals since the start, and the seconds of each step.",
        (
            Panel("scored", "Tokens scored", "tokens", ("scored_tokens", "completion_tokens"), total=True),
            Panel("requests", "Requests", "requests", ("requests",), total=True),
            Panel("retries", "Retries", "requests", ("retries",), total=True),
            Panel("cache_hits", "Cache hits", "scores", ("cache_hits",), total=True),
            Panel("bytes", "Bytes received", "bytes", ("teacher_bytes",), total=True),
            Panel("sample_s", "Seconds of sampling per step", "s", ("sample_s",), smooth=False),
            Panel("learn_s", "Seconds of learning per step", "s", ("learn_s",), smooth=False),
            Panel("wait_s", "Seconds of waiting for scores per step", "s", ("score_wait_s",), smooth=False),
            Panel("publish_s", "Seconds of sending weights to the sampler", "s", ("publish_s",), smooth=False,
                  special=True),
        ),
    ),
)  # fmt: skip

"""The verdict of a comparison never says one thing by the area and another by the last values without naming both."""

import pytest

from tests.compose.comparison.test_statistics import result
from topkd.compose.comparison.summary import judge_arms, summarize_arms

SHOWN = {"a": "A", "b": "B", "c": "C"}


def said_of(curves, seeds=(0, 1, 2), controls=()):
    arms = sorted({arm for arm, _ in curves})
    rows = summarize_arms(arms, {key: result(values) for key, values in curves.items()}, seeds, "reverse_kl", 0.8)
    return judge_arms(rows, SHOWN, "reverse_kl", controls)


def curves(**shapes):
    """Every seed a little apart, all arms alike: a difference between shapes is a clear one."""
    return {
        (arm, seed): [value * (1 + 0.3 * seed + 0.001 * seed * place) for place, value in enumerate(shape)]
        for arm, shape in shapes.items()
        for seed in range(3)
    }


def test_an_arm_that_is_first_on_the_way_and_at_the_end_wins_and_both_are_said():
    said = said_of(curves(a=[1, 0.5, 0.4], b=[1, 0.9, 0.8]))
    assert said["winner"] == "a"
    assert said["text"].startswith("A wins: its area under KL(student ‖ teacher) is 0.6")
    assert said["ends"].startswith("A also ends lowest: its last value is 0.500")


def test_a_control_cannot_win_and_stands_beside_the_arm_that_did():
    shapes = curves(a=[1, 0.5, 0.4], b=[1, 0.9, 0.8], c=[1, 0.2, 0.1])
    assert said_of(shapes)["winner"] == "c"
    said = said_of(shapes, controls={"c"})
    assert (said["winner"], said["lowest_end"], [entry["arm"] for entry in said["against"]]) == ("a", "a", ["b"])
    assert said["text"].startswith("A wins: its area under KL(student ‖ teacher) is 0.6")
    assert "C" not in said["text"]
    assert said["ends"].endswith(
        "C, a control, has an area of 0.625 (0.625 to 0.625) of A's, and a last value of 0.250 (0.250 to 0.250)."
    )


def test_an_arm_alone_beside_a_control_wins_nothing_and_is_set_against_it():
    said = said_of(curves(a=[1, 0.5], c=[1, 0.2]), controls={"c"})
    assert said["winner"] is None
    assert said["text"] == "Controls aside, fewer than two arms finished: nothing to compare."
    assert said["ends"].startswith(
        "C, a control, has an area of 0.800 (0.800 to 0.800) of A's, and a last value of 0.400"
    )


@pytest.mark.parametrize(
    ("seed", "text", "ends"),
    [
        (0, "on the only seed: a single pair has no spread.", "A also ends lowest, on that seed."),
        (1, "but no seed in common with B: no pairs.", "A also ends lowest, without a pair as well."),
    ],
)
def test_one_pair_and_no_pair_are_not_the_same_want(seed, text, ends):
    said = said_of({("a", 0): [1, 0.5], ("b", seed): [1, 0.6]})
    assert (said["winner"], said["ends"]) == (None, ends)
    assert said["text"].startswith("A has the smallest area under KL(student ‖ teacher)")
    assert said["text"].endswith(text)


def test_an_arm_that_is_faster_and_one_that_ends_lower_are_both_named_and_nobody_wins():
    said = said_of(curves(a=[1, 0.4, 0.4, 0.4], b=[1, 0.9, 0.8, 0.2], c=[1, 0.95, 0.9, 0.9]))
    assert said["winner"] is None
    assert (said["best"], said["lowest_end"]) == ("a", "b")
    assert said["text"].startswith("Divided: A learns faster, with an area under KL(student ‖ teacher) of 0.")
    assert "; B ends lower, with a last value of 0.50" in said["text"]
    assert said["text"].endswith("of A's.")
    assert said["ends"].startswith("B ends lowest: its last value is 0.50")


def test_a_lower_end_within_the_spread_takes_no_win_away_and_is_said_to_be_doubtful():
    ends = {0: 0.395, 1: 0.41, 2: 0.38}
    both = {("a", seed): [1, 0.3, 0.4] for seed in ends} | {("b", seed): [1, 0.9, end] for seed, end in ends.items()}
    said = said_of(both)
    assert said["winner"] == "a"
    assert said["ends"].startswith(
        "B ends lowest, but paired seeds do not separate its last value from those of A, ratio 0.9"
    )


def test_areas_that_cannot_be_told_apart_leave_the_last_values_their_say():
    middle = {0: (0.50, 0.52), 1: (0.54, 0.50), 2: (0.50, 0.51)}
    both = {("a", seed): [1, one, 0.40] for seed, (one, _) in middle.items()}
    both |= {("b", seed): [1, two, 0.35] for seed, (_, two) in middle.items()}
    said = said_of(both | {("c", seed): [1, 0.51, 0.42] for seed in middle})
    assert said["winner"] is None
    assert said["text"].startswith("No clear winner: B has the smallest area")
    assert "do not separate it from A, ratio 0.9" in said["text"]
    assert said["ends"].startswith("B also ends lowest: its last value is 0.875 (0.875 to 0.875) of the runner-up's, A")


def test_a_seed_that_one_arm_lacks_moves_nobody_elses_rank():
    """B's mean over its own two seeds is lower; on the seeds that both have, A is."""
    both = {("a", 0): [1, 0.5], ("a", 1): [1, 0.52], ("a", 2): [1, 0.99]}
    said = said_of(both | {("b", 0): [1, 0.6], ("b", 1): [1, 0.63]})
    assert said["best"] == "a"


@pytest.mark.parametrize("curve", [[1, None], [1, None, 0.5]])
def test_with_one_whole_curve_there_is_nothing_to_compare(curve):
    said = said_of({("a", 0): [1, 0.5], ("b", 0): curve})
    assert (
        said["text"]
        == "Fewer than two arms finished: nothing to compare. Not ranked, because their curves are incomplete: B."
    )
    assert (said["winner"], said["ends"]) == (None, "")

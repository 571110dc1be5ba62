"""Alarms sound once, when something begins to go wrong, and never for a steady run."""

from topkd.engine.loop.metrics import find_alarms


def run(**series):
    return [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]


def sounded(records):
    return [(i, alarm["alarm"]) for i in range(len(records)) for alarm in find_alarms(records[: i + 1])]


def test_a_steady_run_is_silent():
    assert (
        sounded(run(truncation_rate=[0.1, 0.2] * 10, length_mean=[30.0, 40.0] * 10, eos_probability=[0.03] * 20)) == []
    )


def test_completions_that_grow_until_they_are_cut_sound_once_each():
    lengths = [30.0] * 10 + [90.0] * 10
    cut = [0.0] * 10 + [1.0] * 10
    assert sounded(run(length_mean=lengths, truncation_rate=cut)) == [(12, "truncation_rate"), (12, "length_mean")]


def test_a_share_of_cut_completions_is_judged_over_five_steps_and_not_over_the_first_ones():
    assert sounded(run(truncation_rate=[1.0] * 4)) == []
    assert sounded(run(truncation_rate=[1.0] * 20)) == [(4, "truncation_rate")]
    assert sounded(run(truncation_rate=[1.0, 1.0, 0.0, 0.0, 0.0] + [0.0] * 5)) == []


def test_an_end_of_text_that_fades_sounds_and_sounds_again_after_it_came_back():
    fading = [0.05] * 10 + [0.0001] * 5 + [0.05] * 6 + [0.0001] * 5
    assert [name for _, name in sounded(run(eos_probability=fading))] == ["eos_probability"] * 2


def test_what_is_not_in_the_records_is_not_judged():
    assert sounded([{"truncation_rate": None}, {}] * 8) == []


def test_a_sampler_that_leaves_its_weights_sounds_once_until_it_has_been_seen_right_again():
    """Batches of older weights say nothing of it (null): they neither sound it nor end it."""
    wide, right = 0.3, 1e-4
    said = [right, None, wide, None, wide, None, right, wide]
    assert sounded(run(mismatch_kl=said)) == [(2, "mismatch_kl"), (7, "mismatch_kl")]

"""Amounts as people read them."""

import pytest

from topkd.cli.output.formatting import format_bytes, format_count


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (64_500, "64.5 kB"), (999_400, "999 kB"), (999_999, "1 MB"),
     (1.25e9, "1.25 GB"), (20e12, "20 TB")],
)  # fmt: skip
def test_bytes_have_three_digits_and_the_unit_that_they_round_to(number, shown):
    assert format_bytes(number) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (9_999, "9,999"), (10_000, "10 k"), (999_499, "999 k"), (999_600, "1 M"), (1_543_000_000, "1.54 B")],
)
def test_counts_are_whole_as_long_as_they_are_short(number, shown):
    assert format_count(number) == shown

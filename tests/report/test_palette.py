"""The page's colours are legible (WCAG AA) and told apart with every kind of colour vision."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from topkd.report.page.palette import (
    GROUPS,
    RAMP_ENDS,
    RAMP_STEPS,
    THEMES,
    make_ramp,
    write_stylesheet,
)

BOTH = pytest.mark.parametrize("theme", ["light", "dark"])
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISIONS = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def compute_contrast(first: str, second: str) -> float:
    """Compute the WCAG 2 contrast ratio of two colours, 1 to 21."""
    lighter, darker = sorted((compute_luminance(first), compute_luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def compute_luminance(colour: str) -> float:
    """Compute the WCAG 2 relative luminance, 0 to 1."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_the_wcag_ratio() -> None:
    assert compute_contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert compute_contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@BOTH
@pytest.mark.parametrize("surface", ["card", "page", "warn-card", "mark"])
def test_text_reaches_four_and_a_half_to_one(theme: str, surface: str) -> None:
    colours = THEMES[theme]
    texts = ["ink"] if surface in ("warn-card", "mark") else ["ink", "soft", "accent"]
    for name in texts + (["warn"] if surface == "warn-card" else []):
        assert compute_contrast(colours[name], colours[surface]) >= 4.5, (theme, name, surface)


@BOTH
def test_lines_borders_and_the_focus_ring_reach_three_to_one(theme: str) -> None:
    colours = THEMES[theme]
    for colour in [*GROUPS[theme], colours["axis"], colours["focus"], colours["accent"]]:
        assert compute_contrast(colour, colours["card"]) >= 3.0, (theme, colour)
    assert compute_contrast(colours["focus"], colours["page"]) >= 3.0


@BOTH
def test_every_token_colour_leaves_its_text_legible(theme: str) -> None:
    for end in RAMP_ENDS[theme]:
        for colour in make_ramp(theme, end):
            assert compute_contrast(THEMES[theme]["ink"], colour) >= 4.5, (theme, end, colour)


@BOTH
@pytest.mark.parametrize("vision", VISIONS)
def test_settings_and_signs_are_told_apart(theme: str, vision: str) -> None:
    for first, second in itertools.combinations(GROUPS[theme], 2):
        assert distance(first, second, vision) > 20.0, (theme, first, second)
    ends = RAMP_ENDS[theme]
    assert distance(ends["below"], ends["above"], vision) > 20.0


@BOTH
def test_token_ramps_move_steadily_away_from_the_card(theme: str) -> None:
    for end in RAMP_ENDS[theme]:
        steps = [distance(THEMES[theme]["card"], colour, "full") for colour in make_ramp(theme, end)]
        assert len(steps) == RAMP_STEPS
        assert steps[0] == 0.0
        assert all(later - earlier > 3.0 for earlier, later in itertools.pairwise(steps))


def test_the_stylesheet_follows_the_system_and_the_readers_choice() -> None:
    text = write_stylesheet()
    assert "@media screen and (prefers-color-scheme: dark){:root:not([data-theme=light])" in text
    assert text.count(f"--ink:{THEMES['dark']['ink']}") == 2  # by the system, and by choice
    assert ".g17{--c:var(--g5);--dash:2 3}" in text


def distance(first: str, second: str, vision: str) -> float:
    """CIE76 distance of two colours as that eye sees them."""
    return float(np.linalg.norm(_lab(first, vision) - _lab(second, vision)))


def _lab(colour: str, vision: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(VISIONS[vision]) @ linear, 0.0, 1.0)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(f > 216 / 24389, np.cbrt(f), (24389 / 27 * f + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

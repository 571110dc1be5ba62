"""The page's colours, light and dark: distinguishable with every kind of colour vision, legible (WCAG AA, tested).

Groups also differ by dash pattern, and a token's number is always beside its colour: no fact is shown by colour alone.
"""

from __future__ import annotations

from typing import Final

THEMES: Final[dict[str, dict[str, str]]] = {
    "light": {
        "page": "#f6f7f9",
        "card": "#ffffff",
        "ink": "#16191d",
        "soft": "#555c66",  # less important text
        "line": "#dfe3e8",  # thin lines without a meaning
        "axis": "#7d8590",
        "accent": "#0b5cad",
        "focus": "#b3261e",
        "good": "#1b6e3c",
        "warn": "#8a4b00",
        "warn-card": "#fff4e2",
        "mark": "#fff1c9",  # background of settings that differ
    },
    "dark": {
        "page": "#0f1216",
        "card": "#181c22",
        "ink": "#eceff3",
        "soft": "#a9b1bc",
        "line": "#2c323a",
        "axis": "#7f8894",
        "accent": "#7ab8f5",
        "focus": "#ffb27a",
        "good": "#6fd39a",
        "warn": "#f2bd72",
        "warn-card": "#2e2415",
        "mark": "#463a10",
    },
}

# Blue, orange, green, purple, ochre, grey: found by a search for the largest distance under every kind of colour
# vision, with a contrast of 3:1.
GROUPS: Final[dict[str, list[str]]] = {
    "light": ["#0b8add", "#d46916", "#153e35", "#860c8c", "#564707", "#687081"],
    "dark": ["#1978fb", "#fc5738", "#6af6d7", "#f88ff8", "#fdea9c", "#7f8182"],
}
DASHES: Final = ["", "6 3", "2 3"]  # the second and third round of the colours

# Ends of the colour ramps for tokens; the middle is the card's colour. Below zero is orange, above zero is blue.
RAMP_ENDS: Final[dict[str, dict[str, str]]] = {
    "light": {"below": "#f3a55c", "above": "#78b6ea", "much": "#b99ae0"},
    "dark": {"below": "#8d4a10", "above": "#1d5c94", "much": "#6a47a3"},
}
RAMP_STEPS: Final = 5  # on each side of zero, zero included


def make_ramp(theme: str, end: str) -> list[str]:
    """Make ``RAMP_STEPS`` colours from the card to an end of ``RAMP_ENDS``."""
    card, full = _rgb(THEMES[theme]["card"]), _rgb(RAMP_ENDS[theme][end])
    shares = [step / (RAMP_STEPS - 1) for step in range(RAMP_STEPS)]
    return [_hex([round(a + (b - a) * share) for a, b in zip(card, full, strict=True)]) for share in shares]


def write_stylesheet() -> str:
    """Write the colours as CSS properties: the system's theme, or the one that the reader chose; light in print."""
    light, dark = (_properties(theme) for theme in ("light", "dark"))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media screen and (prefers-color-scheme: dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
        + "".join(
            f".g{i}{{--c:var(--g{i % len(GROUPS['light'])});--dash:{DASHES[i // len(GROUPS['light'])] or 'none'}}}\n"
            for i in range(len(GROUPS["light"]) * len(DASHES))
        )
        + "".join(f".{end}{i}{{background:var(--{end}{i})}}\n" for end in RAMP_ENDS["light"] for i in range(RAMP_STEPS))
    )


def _properties(theme: str) -> str:
    pairs = list(THEMES[theme].items())
    pairs += [(f"g{i}", colour) for i, colour in enumerate(GROUPS[theme])]
    pairs += [(f"{end}{i}", colour) for end in RAMP_ENDS[theme] for i, colour in enumerate(make_ramp(theme, end))]
    return "".join(f"--{name}:{colour};" for name, colour in pairs)


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _hex(rgb: list[int]) -> str:
    return "#" + "".join(f"{value:02x}" for value in rgb)

"""The table of a comparison on a terminal: names as they are, and means over all seeds."""

from rich.console import Console

from topkd.cli.commands.compare import _build_table


def fact(final, size):
    return {"final": final, "teacher_bytes": size, "tokens_to_target": 10.0, "censored": False}


def row(arm, seeds):
    ratio = {"ratio": 0.5, "low": 0.25, "high": 0.75, "pairs": len(seeds)}
    spread = {"mean": 1.0 if seeds else None, "sd": None}
    reached = {"tokens_to_target": 10.0 if seeds else None, "censored": 0}
    return {"arm": arm, "seeds": seeds, "final": spread, "area_ratio": ratio, **reached}


def test_a_name_with_brackets_is_shown_whole_and_the_teachers_bill_is_a_mean_over_seeds():
    names = {"a": "ids=[1, 2]", "b": "end=[/s]", "c": "failed"}
    rows = [row("a", {"0": fact(1.0, 1000), "1": fact(1.0, 3000)}), row("b", {"0": fact(1.0, 512)}), row("c", {})]
    arms = [{"name": name, "label": label, "lr": None} for name, label in names.items()]
    console = Console(width=100, record=True)
    with console.capture() as shown:
        _build_table(console, {"arms": arms, "target": 0.8, "reference": "a", "metric": "jsd"}, rows, "live")
    lines = [line.rstrip() for line in shown.get().splitlines()]
    (first,), (second,), (third,) = ([line for line in lines if line.startswith(name)] for name in names.values())
    assert first.endswith("  2 kB")
    assert second.endswith("  512 B")
    assert third.endswith("  -")
    assert "0.500 (0.25-0.75)" in second

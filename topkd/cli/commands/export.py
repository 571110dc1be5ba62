"""``topkd export``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import AsJson, flag, option, require_extra


def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN")],
    out: Annotated[Path | None, option("Folder to write; default: RUN/export.", "FOLDER")] = None,
    merge: Annotated[bool, flag("--merge", "Merge a LoRA adapter into its base model.")] = False,
    dtype: Annotated[
        str | None,
        option("fp32, bf16 or fp16; default: that of the weights.", "TYPE", one_of=("fp32", "bf16", "fp16")),
    ] = None,
    best: Annotated[bool, flag("--best", "Export the best student (eval.best) instead of the last.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's student as a model folder for transformers and vLLM, and check that it loads unchanged.

    Example: topkd export runs/first --dtype bf16 --out models/first
    """
    require_extra("export", "torch", "transformers", "safetensors", extra="train")
    from topkd.compose.export import export

    done = export(run, out, merge=merge, dtype=dtype, best=best)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(done), "path": str(done.path)}))
        return
    typer.echo(
        f"{done.path}: {done.kind}, {done.parameters:,} parameters in {done.dtype}; "
        f"reloaded, no logit differs by more than {done.difference:.2g}"
    )

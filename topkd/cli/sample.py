"""``topkd sample``."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.display import Display
from topkd.compose.api_keys import api_key


def command(
    data: Annotated[Path, typer.Argument(help="JSONL, Parquet or a datasets folder of prompts.")],
    teacher: Annotated[str, typer.Option(help="Base URL of the teacher.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or id of the served model's tokenizer; needed unless rows hold ids.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Served name; the server's only one when left out.")] = None,
    dialect: Annotated[
        str, typer.Option(help="auto, openai (chat completions), vllm, vllm_generate or sglang.")
    ] = "auto",
    k: Annotated[int, typer.Option("--k", min=0, help="Entries of each position; 0 for completions alone.")] = 20,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Completions of each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one completion at most.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other completions.")] = 0,
    revision: Annotated[str, typer.Option(help="Fingerprint of the teacher's weights, if its name may change.")] = "",
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the API key.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read this many rows at most.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop before more tokens, prompts and completions, are paid for.")
    ] = None,
    max_cost: Annotated[float | None, typer.Option(help="Stop before more is spent.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Price of a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million sampled tokens.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Count tokens and cost; sample nothing.")] = False,
    codec: Annotated[str, typer.Option(help="packed (fp16 logprobs), raw (exact) or cold (smallest).")] = "packed",
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at once at most.")] = 16,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that is refused.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Let the teacher write completions into a cache, with its logprobs: for servers that sample but cannot score.

    Replay them off-policy: --set replay.order=shuffled, with a direct objective (gjs_direct, fkl, ...), or with gjs,
    scalar_kl or topk_pg, whose importance weights start from the teacher's own logprobs.

    Exit code 0: every prompt has its completions. 1: rows were refused or not answered (each is named), or a cap
    stopped the job; everything else is in the cache. 2: the question cannot be right, and nothing was asked.

    Example: topkd sample prompts.jsonl --teacher https://api.example.com --model m --tokenizer ./m --out cache
    """
    from topkd.compose.config import validated
    from topkd.compose.sample import sample_data
    from topkd.compose.sample_config import SampleConfig

    values = {
        "data": data, "out": out, "teacher": teacher, "model": model, "dialect": dialect, "tokenizer": tokenizer,
        "k": k, "n": n, "max_new_tokens": max_new_tokens, "seed": seed, "revision": revision,
        "api_key": api_key(api_key_env, said="--api-key-env"),
        "limit": limit, "max_tokens": max_tokens, "max_cost": max_cost,
        "price_in": price_in, "price_out": price_out, "estimate": estimate, "codec": codec, "in_flight": in_flight,
        "strict": strict,
    }  # fmt: skip
    config = validated(SampleConfig, values, where="topkd sample")
    with Display() as display:
        report = asyncio.run(sample_data(config, display)).as_dict()
    typer.echo(json.dumps(report)) if as_json else _show(report)
    if not report["complete"] or (report["refused"] and not report["estimate"]):
        raise typer.Exit(1)


def _show(report: dict[str, object]) -> None:
    reasons, refusals = report["reasons"], report["refusals"]
    assert isinstance(reasons, dict)  # noqa: S101 - for the type checker
    assert isinstance(refusals, list)  # noqa: S101 - for the type checker
    counts = ", ".join(f"{report[name]} {name}" for name in ("sampled", "cached", "refused", "failed")
                       if report[name] or name == "sampled")  # fmt: skip
    if report["estimate"]:
        counts = counts.replace("sampled", "to sample", 1)
    typer.echo(f"{report['rows']} prompts: {counts}")
    cost = "" if report["cost"] is None else f", cost {report['cost']:.4f}"
    if report["estimate"]:
        typer.echo(f"{report['prompt_tokens']} prompt tokens, at most {report['completion_tokens']} sampled{cost}")
    else:
        typer.echo(
            f"{report['completions']} completions kept with K = {report['k']}; "
            f"{report['prompt_tokens']} prompt tokens, {report['completion_tokens']} sampled{cost}"
        )
    for name, what in (
        ("ambiguous_completions", "completions dropped: bytes in them name no single token id"),
        ("ambiguous_entries", f"of {report['listed_entries']} list entries name no single id: their lists end before"),
    ):
        if report[name]:
            typer.echo(f"{report[name]} {what}")
    for what, number in reasons.items():
        typer.echo(f"  {number} x {what}")
    for refusal in refusals[:10]:
        typer.echo(f"  row {refusal['row']}: {refusal['reason']}")
    if len(refusals) > 10:
        typer.echo("  ... (--json lists the first 1,000)")
    if report["stopped"]:
        typer.echo(f"stopped at {report['stopped']}; raise it and run the same command again to go on")
    if report["failed"]:
        typer.echo("the server did not answer for some rows; run the same command again for those")

"""``topkd score``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.display import Display
from topkd.compose.api_keys import api_key
from topkd.topk.errors import ConfigError


def command(
    data: Annotated[Path, typer.Argument(help="JSONL, Parquet, a datasets folder, or a cache to score anew.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="Base URL of the teacher; repeat it for replicas. vllm:FOLDER loads it here."),
    ] = None,
    teacher_id: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=URL: this server scores the rows whose teacher_id is NAME; repeatable, also for replicas. "
            "NAME alone, beside --teacher: score the rows of this teacher_id and pass over the others."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Served name; the server's only one when left out. NAME=MODEL for one of several teachers."),
    ] = None,
    dialect: Annotated[str, typer.Option(help="auto, vllm, vllm_generate, sglang or fireworks.")] = "auto",
    k: Annotated[int, typer.Option("--k", min=1, help="Entries of each position.")] = 20,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or id of the tokenizer, for rows of text.")] = None,
    revision: Annotated[
        list[str] | None,
        typer.Option(
            help="Fingerprint of the teacher's weights, if its name may change. NAME=REVISION for one of several."
        ),
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the API key.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read this many rows at most.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: of n parts the i-th.")] = "1/1",
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Skip rows that came before, across shards too.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop before more tokens are sent.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="Stop before more is spent.")] = None,
    price_per_million: Annotated[float | None, typer.Option(help="Price of a million tokens sent.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Count tokens and cost; score nothing.")] = False,
    codec: Annotated[str, typer.Option(help="packed (fp16 logprobs), raw (exact) or cold (smallest).")] = "packed",
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at once at most.")] = 128,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that is refused.")] = False,
    runner: Annotated[
        str, typer.Option(help="local, or ray: many workers, on this machine or a cluster, into the one cache.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Workers of --runner ray; they share --in-flight.")] = 4,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for vllm:FOLDER, as in --engine dtype=bfloat16; an argument of vllm.LLM."),
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0.0, help="GPUs that each worker of --runner ray takes, for vllm:FOLDER.")
    ] = 0.0,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; RAY_ADDRESS when left out, else one is started here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    """Score a data file into a cache; run it again to go on where it stopped, for what is cached costs nothing.

    Exit code 0: every row is in the cache. 1: rows were refused or not answered (each is named), or a cap stopped the
    job; everything else is in the cache. 2: the question cannot be right, and nothing was asked.

    Example: topkd score data.jsonl --teacher http://127.0.0.1:8000 --k 20 --out cache
    """
    from topkd.compose.config import validated
    from topkd.compose.score import ScoreConfig, score_data

    routes, wanted = _routes(teacher_id or [])
    if bool(teacher) == bool(routes):
        raise ConfigError(
            "who scores?", got="both" if teacher else "no server",
            expected="--teacher URL, or --teacher-id NAME=URL for each teacher that the rows name",
        )  # fmt: skip
    one_model, models = _named(model or [], routes, "--model")
    one_revision, revisions = _named(revision or [], routes, "--revision")
    values = {
        "data": data, "out": out, "teachers": tuple(teacher or ()), "routes": routes, "model": one_model,
        "models": models, "dialect": dialect, "k": k, "tokenizer": tokenizer, "revision": one_revision or "",
        "revisions": revisions, "teacher_id": wanted, "limit": limit,
        "api_key": api_key(api_key_env, said="--api-key-env"),
        "shard": _shard(shard), "dedupe": dedupe, "max_tokens": max_tokens, "max_cost": max_cost,
        "price_per_million": price_per_million, "estimate": estimate, "codec": codec, "in_flight": in_flight,
        "strict": strict, "runner": runner, "workers": workers, "gpus_per_worker": gpus_per_worker,
        "engine": dict(_argument(text) for text in engine or []),
        "ray_address": ray_address,
    }  # fmt: skip
    config = validated(ScoreConfig, values, where="topkd score")
    # Ray prints what happens to its workers; standard output is for the report alone.
    with Display() as display, contextlib.redirect_stdout(sys.stderr):
        report = asyncio.run(score_data(config, display))
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        _show(report.as_dict())
    if not report.complete or (report.refused and not report.estimate):
        raise typer.Exit(1)


def _routes(given: list[str]) -> tuple[dict[str, tuple[str, ...]], str]:
    """NAME=URL pairs as URLs by name, and the one NAME that came alone."""
    routes: dict[str, tuple[str, ...]] = {}
    alone = [text for text in given if "=" not in text]
    for text in given:
        name, separator, url = text.partition("=")
        if separator:
            if not name.strip() or "://" not in url:
                raise ConfigError("--teacher-id takes NAME=URL", got=text, expected="maths=http://127.0.0.1:8000, say")
            routes[name.strip()] = (*routes.get(name.strip(), ()), url.strip())
    if len(alone) > 1 or (alone and routes):
        raise ConfigError("--teacher-id takes one NAME, or NAME=URL pairs only", got=" ".join(given))
    return routes, alone[0] if alone else ""


def _argument(text: str) -> tuple[str, object]:
    """KEY=VALUE; the value as TOML has it, or a bare word."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError("--engine takes KEY=VALUE", got=text, expected="dtype=bfloat16, say")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def _named(given: list[str], routes: dict[str, tuple[str, ...]], flag: str) -> tuple[str | None, dict[str, str]]:
    """What holds for every teacher, and what for one by its name; a name may itself hold an equals sign."""
    plain: list[str] = []
    by_name: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if separator and name in routes:
            by_name[name] = value
        else:
            plain.append(text)
    if len(plain) > 1:
        raise ConfigError(
            f"{flag} was given {len(plain)} times", got=" ".join(plain), hint="NAME=VALUE for each of several"
        )
    return plain[0] if plain else None, by_name


def _show(report: dict[str, object]) -> None:
    reasons, refusals = report["reasons"], report["refusals"]
    assert isinstance(reasons, dict)  # noqa: S101 - for the type checker
    assert isinstance(refusals, list)  # noqa: S101 - for the type checker
    names = ("scored", "cached", "duplicates", "skipped", "refused", "failed")
    counts = ", ".join(f"{report[name]} {name}" for name in names if report[name] or name == "scored")
    if report["estimate"]:
        counts = counts.replace("scored", "to score", 1)
    typer.echo(f"{report['rows']} rows: {counts}; {report['positions']} positions at K = {report['k']}")
    cost = "" if report["cost"] is None else f", cost {report['cost']:.4f}"
    verb = "to send" if report["estimate"] else "sent"
    typer.echo(f"{report['tokens_sent']} tokens {verb}, {report['saved_tokens']} spared by the cache{cost}")
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


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError("--shard takes i/n", got=text, expected="1/4 to 4/4, say")
    return int(part), int(parts)

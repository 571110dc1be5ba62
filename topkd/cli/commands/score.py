"""``topkd score``."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topkd.cli.options import COST, AsJson, CacheOut, CodecName, InFlight, Limit, MaxCost, Strict, flag, option
from topkd.cli.output.job_summary import format_cost, format_counts, print_report_and_exit
from topkd.cli.output.progress import Display
from topkd.clients.dialects.records import list_dialects
from topkd.compose.config.api_keys import read_api_key
from topkd.topk.errors import ConfigError

DIALECTS = list_dialects(scores=True)
TEACHER, WORKERS = "Teacher", "Many workers, or the teacher in them"

if TYPE_CHECKING:
    from topkd.compose.bulk.config import ScoreReport


def score_command(
    data: Annotated[
        Path, typer.Argument(help="JSONL, Parquet, a datasets folder, or a cache to score anew.", metavar="DATA")
    ],
    out: CacheOut,
    teacher: Annotated[
        list[str] | None,
        option("Base URL; repeat it for replicas. vllm:FOLDER loads the teacher here.", "URL", panel=TEACHER),
    ] = None,
    teacher_id: Annotated[
        list[str] | None,
        option(
            "This server scores the rows whose teacher_id is NAME; repeatable, also for replicas. "
            "NAME alone, beside --teacher: score the rows of this teacher_id and pass over the others.",
            "NAME=URL",
            panel=TEACHER,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        option(
            "Served name; the server's only one when left out. NAME=MODEL for one of several teachers.",
            "MODEL",
            panel=TEACHER,
        ),
    ] = None,
    dialect: Annotated[
        str,
        option(f"{', '.join(DIALECTS[:-1])} or {DIALECTS[-1]}.", "NAME", one_of=DIALECTS, panel=TEACHER),
    ] = "auto",
    k: Annotated[int, option("Entries of each position.", "K", "--k", min=1)] = 20,
    tokenizer: Annotated[str | None, option("Tokenizer (folder or id), for rows of text.", "MODEL")] = None,
    revision: Annotated[
        list[str] | None,
        option(
            "Fingerprint of the weights, if the name may change. NAME=REVISION for one of several.",
            "TEXT",
            panel=TEACHER,
        ),
    ] = None,
    vocab_size: Annotated[
        list[str] | None,
        option(
            "Ids of its vocabulary: a reply with one past it is a fault. NAME=N for one of several.", "N", panel=TEACHER
        ),
    ] = None,
    api_key_env: Annotated[
        str | None, option("Environment variable that holds the API key.", "NAME", panel=TEACHER)
    ] = None,
    limit: Limit = None,
    shard: Annotated[str, option("Of N parts the I-th.", "I/N")] = "1/1",
    dedupe: Annotated[bool, flag("--dedupe", "Skip rows that came before, across shards too.")] = False,
    max_tokens: Annotated[int | None, option("Stop before more tokens are sent.", "N", min=1, panel=COST)] = None,
    max_cost: MaxCost = None,
    price_per_million: Annotated[float | None, option("Price of a million tokens sent.", "X", panel=COST)] = None,
    estimate: Annotated[bool, flag("--estimate", "Count tokens and cost; score nothing.", panel=COST)] = False,
    codec: CodecName = "packed",
    in_flight: InFlight = 128,
    strict: Strict = False,
    runner: Annotated[
        str,
        option(
            "local, or ray: many workers, here or on a cluster, into the one cache.",
            "NAME",
            one_of=("local", "ray"),
            panel=WORKERS,
        ),
    ] = "local",
    workers: Annotated[int, option("Of --runner ray; they share --in-flight.", "N", min=1, panel=WORKERS)] = 4,
    gpus_per_worker: Annotated[
        float, option("GPUs that each of them takes, for vllm:FOLDER.", "X", min=0.0, panel=WORKERS)
    ] = 0.0,
    ray_address: Annotated[
        str | None,
        option("Cluster to join; RAY_ADDRESS when left out, else one is started.", "ADDRESS", panel=WORKERS),
    ] = None,
    engine: Annotated[
        list[str] | None,
        option("An argument of vllm.LLM for vllm:FOLDER, as in dtype=bfloat16.", "KEY=VALUE", panel=WORKERS),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a data file into a cache; run it again to continue, and cached rows cost nothing.

    Exit code 0: every row is in the cache. 1: rows were refused or not answered (each is named), or a cap stopped the
    job; everything else is in the cache. 2: invalid arguments or input; no request was sent.

    Example: topkd score data.jsonl --teacher http://127.0.0.1:8000 --out cache
    """
    from topkd.compose.config.run_config import validate_config
    from topkd.compose.score import ScoreConfig, score

    routes, wanted = _parse_routes(teacher_id or [])
    if bool(teacher) == bool(routes):
        raise ConfigError(
            "who scores?", got="both" if teacher else "no server",
            expected="--teacher URL, or --teacher-id NAME=URL for each teacher that the rows name",
        )  # fmt: skip
    one_model, models = _split_named(model or [], routes, "--model")
    one_revision, revisions = _split_named(revision or [], routes, "--revision")
    one_size, sizes = _split_named(vocab_size or [], routes, "--vocab-size")
    values = {
        "data": data, "out": out, "teachers": tuple(teacher or ()), "routes": routes, "model": one_model,
        "models": models, "dialect": dialect, "k": k, "tokenizer": tokenizer, "revision": one_revision or "",
        "revisions": revisions, "vocab_size": one_size, "vocab_sizes": sizes, "teacher_id": wanted, "limit": limit,
        "api_key": read_api_key(api_key_env, source="--api-key-env"),
        "shard": _parse_shard(shard), "dedupe": dedupe, "max_tokens": max_tokens, "max_cost": max_cost,
        "price_per_million": price_per_million, "estimate": estimate, "codec": codec, "in_flight": in_flight,
        "strict": strict, "runner": runner, "workers": workers, "gpus_per_worker": gpus_per_worker,
        "engine": dict(_parse_argument(text) for text in engine or []),
        "ray_address": ray_address,
    }  # fmt: skip
    config = validate_config(ScoreConfig, values, where="topkd score")
    # Ray prints what happens to its workers; standard output is for the report alone.
    with Display() as display, contextlib.redirect_stdout(sys.stderr):
        report = asyncio.run(score(config, display))
    print_report_and_exit(report, lambda: _format_lines(report), as_json=as_json)


def _parse_routes(arguments: list[str]) -> tuple[dict[str, tuple[str, ...]], str]:
    """NAME=URL pairs as URLs by name, and the one NAME that came alone."""
    routes: dict[str, tuple[str, ...]] = {}
    alone = [text for text in arguments if "=" not in text]
    for text in arguments:
        name, separator, url = text.partition("=")
        if separator:
            if not name.strip() or "://" not in url:
                raise ConfigError("--teacher-id takes NAME=URL", got=text, expected="maths=http://127.0.0.1:8000, say")
            routes[name.strip()] = (*routes.get(name.strip(), ()), url.strip())
    if len(alone) > 1 or (alone and routes):
        raise ConfigError("--teacher-id takes one NAME, or NAME=URL pairs only", got=" ".join(arguments))
    return routes, alone[0] if alone else ""


def _parse_argument(text: str) -> tuple[str, object]:
    """KEY=VALUE; the value as TOML has it, or a bare word."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError("--engine takes KEY=VALUE", got=text, expected="dtype=bfloat16, say")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def _split_named(
    arguments: list[str], routes: dict[str, tuple[str, ...]], flag: str
) -> tuple[str | None, dict[str, str]]:
    """What holds for every teacher, and what for one by its name; a name may itself hold an equals sign."""
    plain: list[str] = []
    by_name: dict[str, str] = {}
    for text in arguments:
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


def _format_lines(report: ScoreReport) -> list[str]:
    counts = format_counts(report, "scored", "to score", ("cached", "duplicates", "skipped", "refused", "failed"))
    verb = "to send" if report.estimate else "sent"
    lines = [
        f"{report.rows} rows: {counts}; {report.positions} positions at K = {report.k}",
        f"{report.tokens_sent} tokens {verb}, {report.saved_tokens} spared by the cache{format_cost(report)}",
    ]
    if report.estimate and report.unbounded and report.positions:
        lines.append(f"largest id {report.largest_id}; --vocab-size N names the rows that a teacher of N ids refuses")
    return lines


def _parse_shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError("--shard takes i/n", got=text, expected="1/4 to 4/4, say")
    return int(part), int(parts)

"""``topkd score``."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tomllib
from functools import partial
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
TEACHER, WORKERS = "Teacher", "Ray workers, and a teacher inside this process"  # panels

_of_teacher, _of_workers = partial(option, panel=TEACHER), partial(option, panel=WORKERS)
_Data = Annotated[
    Path, typer.Argument(help="JSONL, Parquet, a datasets folder, or a cache to score again.", metavar="DATA")
]
_Teacher = Annotated[
    list[str] | None,
    _of_teacher("Base URL; repeat it for replicas. vllm:FOLDER loads the teacher in this process.", "URL"),
]
_TeacherId = Annotated[
    list[str] | None,
    _of_teacher(
        "Server for the rows whose teacher_id is NAME; repeat it for other teachers, or for replicas. "
        "NAME alone, with --teacher: score only the rows with this teacher_id.",
        "NAME=URL",
    ),
]
_Model = Annotated[
    list[str] | None,
    _of_teacher("Model name on the server; default: its only model. NAME=MODEL for one of several.", "MODEL"),
]
_Dialect = Annotated[str, _of_teacher(f"{', '.join(DIALECTS[:-1])} or {DIALECTS[-1]}.", "NAME", one_of=DIALECTS)]
_Revision = Annotated[
    list[str] | None,
    _of_teacher("Version of the weights; part of the cache's keys. NAME=REVISION for one of several.", "TEXT"),
]
_VocabSize = Annotated[
    list[str] | None, _of_teacher("Vocabulary size: larger ids are refused. NAME=N for one of several.", "N")
]
_ApiKeyEnv = Annotated[str | None, _of_teacher("Environment variable that holds the API key.", "NAME")]
_MaxTokens = Annotated[int | None, option("Stop before sending more tokens than this.", "N", min=1, panel=COST)]
_Price = Annotated[float | None, option("Price of a million tokens sent.", "X", panel=COST)]
_Estimate = Annotated[bool, flag("--estimate", "Count tokens and cost; score nothing.", panel=COST)]
_Runner = Annotated[str, _of_workers("local, or ray: many workers write one cache.", "NAME", one_of=("local", "ray"))]
_Workers = Annotated[int, _of_workers("Number of ray workers; they share --in-flight.", "N", min=1)]
_Gpus = Annotated[float, _of_workers("GPUs for each ray worker, for vllm:FOLDER.", "X", min=0.0)]
_RayAddress = Annotated[
    str | None, _of_workers("Ray cluster to join; default: RAY_ADDRESS, else one is started.", "ADDRESS")
]
_Engine = Annotated[
    list[str] | None, _of_workers("Argument of vllm.LLM for vllm:FOLDER, as in dtype=bfloat16.", "KEY=VALUE")
]

if TYPE_CHECKING:
    from topkd.compose.bulk.config import ScoreReport


def score_command(
    data: _Data,
    out: CacheOut,
    teacher: _Teacher = None,
    teacher_id: _TeacherId = None,
    model: _Model = None,
    dialect: _Dialect = "auto",
    k: Annotated[int, option("Top-K entries of each position.", "K", "--k", min=1)] = 20,
    tokenizer: Annotated[str | None, option("Tokenizer (folder or id), for rows of text.", "MODEL")] = None,
    revision: _Revision = None,
    vocab_size: _VocabSize = None,
    api_key_env: _ApiKeyEnv = None,
    limit: Limit = None,
    shard: Annotated[str, option("Score only part I of N.", "I/N")] = "1/1",
    dedupe: Annotated[bool, flag("--dedupe", "Skip rows equal to an earlier one, also in other shards.")] = False,
    max_tokens: _MaxTokens = None,
    max_cost: MaxCost = None,
    price_per_million: _Price = None,
    estimate: _Estimate = False,
    codec: CodecName = "packed",
    in_flight: InFlight = 128,
    strict: Strict = False,
    runner: _Runner = "local",
    workers: _Workers = 4,
    gpus_per_worker: _Gpus = 0.0,
    ray_address: _RayAddress = None,
    engine: _Engine = None,
    as_json: AsJson = False,
) -> None:
    """Score a data file into a cache; run it again to continue, and cached rows cost nothing.

    Exit code 0: every row is in the cache. 1: rows were refused or not answered (each is named), or a limit stopped the
    job; everything else is in the cache. 2: invalid arguments or input; no request was sent.

    Example: topkd score data.jsonl --teacher http://127.0.0.1:8000 --out cache
    """
    from topkd.compose.config.run_config import validate_config
    from topkd.compose.score import ScoreConfig, score

    values = {
        "data": data, "out": out, "dialect": dialect, "k": k, "tokenizer": tokenizer, "limit": limit,
        "api_key": read_api_key(api_key_env, source="--api-key-env"), "shard": _parse_shard(shard), "dedupe": dedupe,
        "max_tokens": max_tokens, "max_cost": max_cost, "price_per_million": price_per_million, "estimate": estimate,
        "codec": codec, "in_flight": in_flight, "strict": strict, "runner": runner, "workers": workers,
        "gpus_per_worker": gpus_per_worker, "engine": dict(map(_parse_argument, engine or [])),
        "ray_address": ray_address,
    }  # fmt: skip
    values |= _parse_teachers(teacher, teacher_id, model, revision, vocab_size)
    config = validate_config(ScoreConfig, values, where="topkd score")
    # Ray prints messages about its workers; standard output is only for the report.
    with Display() as display, contextlib.redirect_stdout(sys.stderr):
        report = asyncio.run(score(config, display))
    print_report_and_exit(report, lambda: _format_lines(report), as_json=as_json)


def _parse_teachers(
    teacher: list[str] | None,
    teacher_id: list[str] | None,
    model: list[str] | None,
    revision: list[str] | None,
    vocab_size: list[str] | None,
) -> dict[str, object]:
    """Parse the teachers of the rows into fields of a ScoreConfig."""
    routes, wanted = _parse_routes(teacher_id or [])
    if bool(teacher) == bool(routes):
        raise ConfigError(
            "score needs one way to name its teachers", got="both" if teacher else "none",
            expected="--teacher URL, or --teacher-id NAME=URL for each teacher that the rows name",
        )  # fmt: skip
    shared_model, models = _split_named(model or [], routes, "--model")
    shared_revision, revisions = _split_named(revision or [], routes, "--revision")
    shared_size, sizes = _split_named(vocab_size or [], routes, "--vocab-size")
    return {
        "teachers": tuple(teacher or ()), "routes": routes, "teacher_id": wanted, "model": shared_model,
        "models": models, "revision": shared_revision or "", "revisions": revisions, "vocab_size": shared_size,
        "vocab_sizes": sizes,
    }  # fmt: skip


def _parse_routes(arguments: list[str]) -> tuple[dict[str, tuple[str, ...]], str]:
    """Parse NAME=URL pairs to URLs by name, and a NAME without a URL."""
    routes: dict[str, tuple[str, ...]] = {}
    alone = [text for text in arguments if "=" not in text]
    for text in arguments:
        name, separator, url = text.partition("=")
        if separator:
            if not name.strip() or "://" not in url:
                raise ConfigError("--teacher-id takes NAME=URL", got=text, expected="as in maths=http://127.0.0.1:8000")
            routes[name.strip()] = (*routes.get(name.strip(), ()), url.strip())
    if len(alone) > 1 or (alone and routes):
        raise ConfigError("--teacher-id takes one NAME, or NAME=URL pairs only", got=" ".join(arguments))
    return routes, alone[0] if alone else ""


def _parse_argument(text: str) -> tuple[str, object]:
    """Parse KEY=VALUE; the value is TOML, or a word without quotes."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError("--engine takes KEY=VALUE", got=text, expected="as in dtype=bfloat16")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def _split_named(
    arguments: list[str], routes: dict[str, tuple[str, ...]], flag: str
) -> tuple[str | None, dict[str, str]]:
    """Split values for every teacher from NAME=VALUE of a known teacher."""
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
            f"{flag} was given {len(plain)} times", got=" ".join(plain), hint="give NAME=VALUE for each teacher"
        )
    return plain[0] if plain else None, by_name


def _format_lines(report: ScoreReport) -> list[str]:
    counts = format_counts(report, "scored", "to score", ("cached", "duplicates", "skipped", "refused", "failed"))
    verb = "to send" if report.estimate else "sent"
    lines = [
        f"{report.rows} rows: {counts}; {report.positions} positions at K = {report.k}",
        f"{report.tokens_sent} tokens {verb}, {report.saved_tokens} saved by the cache{format_cost(report)}",
    ]
    if report.estimate and report.unbounded and report.positions:
        lines.append(f"largest id {report.largest_id}; --vocab-size N shows which rows a teacher with N ids refuses")
    return lines


def _parse_shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError("--shard takes I/N", got=text, expected="as in 1/4")
    return int(part), int(parts)

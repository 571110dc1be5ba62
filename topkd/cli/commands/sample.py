"""``topkd sample``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topkd.cli.options import (
    COST,
    ApiKeyEnv,
    AsJson,
    CacheOut,
    CodecName,
    InFlight,
    Limit,
    MaxCost,
    Strict,
    flag,
    option,
)
from topkd.cli.output.job_summary import format_cost, format_counts, print_report_and_exit
from topkd.cli.output.progress import Display
from topkd.clients.dialects.records import list_dialects
from topkd.compose.config.api_keys import read_api_key

DIALECTS = list_dialects(samples=True, chats=True)

if TYPE_CHECKING:
    from topkd.compose.bulk.config import SampleReport


def sample_command(
    data: Annotated[Path, typer.Argument(help="JSONL, Parquet or a datasets folder of prompts.", metavar="PROMPTS")],
    teacher: Annotated[str, option("Base URL of the teacher.", "URL")],
    out: CacheOut,
    tokenizer: Annotated[
        str | None, option("Teacher's tokenizer (folder or id), unless rows hold ids.", "MODEL")
    ] = None,
    model: Annotated[str | None, option("Model name on the server; default: its only model.", "NAME")] = None,
    dialect: Annotated[
        str, option(f"{', '.join(DIALECTS)}; openai is chat completions.", "NAME", one_of=DIALECTS)
    ] = "auto",
    k: Annotated[int, option("Top-K entries of each position; 0 for text only.", "K", "--k", min=0)] = 20,
    n: Annotated[int, option("Completions per prompt.", "N", "-n", "--n", min=1)] = 1,
    max_new_tokens: Annotated[int, option("Most tokens of one completion.", "N", min=1)] = 512,
    seed: Annotated[int, option("Random seed of the completions.", "N", min=0)] = 0,
    revision: Annotated[str, option("Version of the teacher's weights; part of the cache's keys.", "TEXT")] = "",
    api_key_env: ApiKeyEnv = None,
    limit: Limit = None,
    max_tokens: Annotated[
        int | None, option("Stop before using more prompt and completion tokens than this.", "N", min=1, panel=COST)
    ] = None,
    max_cost: MaxCost = None,
    price_in: Annotated[float | None, option("Price of a million prompt tokens.", "X", panel=COST)] = None,
    price_out: Annotated[float | None, option("Price of a million sampled tokens.", "X", panel=COST)] = None,
    estimate: Annotated[bool, flag("--estimate", "Count tokens and cost; sample nothing.", panel=COST)] = False,
    codec: CodecName = "packed",
    in_flight: InFlight = 16,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Sample completions and logprobs from the teacher into a cache, for servers that sample but cannot score.

    Train on them with topkd replay --set replay.order=shuffled and a direct objective (gjs_direct, fkl, ...),
    or with gjs, scalar_kl or topk_pg, whose importance weights use the teacher's own logprobs.

    Exit code 0: every prompt has its completions. 1: rows were refused or not answered (each is named), or a limit
    stopped the job; everything else is in the cache. 2: invalid arguments or input; no request was sent.

    Example: topkd sample rows.jsonl --teacher URL --tokenizer MODEL --out cache
    """
    from topkd.compose.bulk.config import SampleConfig
    from topkd.compose.config.run_config import validate_config
    from topkd.compose.sample import sample

    values = {
        "data": data, "out": out, "teacher": teacher, "model": model, "dialect": dialect, "tokenizer": tokenizer,
        "k": k, "n": n, "max_new_tokens": max_new_tokens, "seed": seed, "revision": revision,
        "api_key": read_api_key(api_key_env, source="--api-key-env"),
        "limit": limit, "max_tokens": max_tokens, "max_cost": max_cost,
        "price_in": price_in, "price_out": price_out, "estimate": estimate, "codec": codec, "in_flight": in_flight,
        "strict": strict,
    }  # fmt: skip
    config = validate_config(SampleConfig, values, where="topkd sample")
    with Display() as display:
        report = asyncio.run(sample(config, display))
    print_report_and_exit(report, lambda: _format_lines(report), as_json=as_json)


def _format_lines(report: SampleReport) -> list[str]:
    lines = [f"{report.rows} prompts: {format_counts(report, 'sampled', 'to sample', ('cached', 'refused', 'failed'))}"]
    paid = f"{report.prompt_tokens} prompt tokens, "
    if report.estimate:
        return [*lines, f"{paid}at most {report.completion_tokens} sampled{format_cost(report)}"]
    paid += f"{report.completion_tokens} sampled{format_cost(report)}"
    lines.append(f"{report.completions} completions kept with K = {report.k}; {paid}")
    if report.ambiguous_completions:
        lines.append(f"{report.ambiguous_completions} completions dropped: they have bytes that fit no single token id")
    if report.ambiguous_entries:
        of = f"of {report.listed_entries} list entries"
        lines.append(f"{report.ambiguous_entries} {of} fit no single token id: the lists end before them")
    return lines

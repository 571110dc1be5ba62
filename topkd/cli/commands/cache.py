"""``topkd cache``: inspect, check, compact, import and export a cache."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from topkd.cli.options import AsJson, flag, option
from topkd.cli.output.cache_stats import count_things, describe_stats
from topkd.topk.errors import ConfigError, DataError

app = typer.Typer(help="Inspect, check and compact a cache; import and export scores.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of the cache.", metavar="CACHE")]


Codec = Literal["packed", "raw", "cold"]


@app.command("stats")
def stats_command(cache: Folder, as_json: AsJson = False) -> None:
    """Show what a cache holds, with histograms of K, captured mass, entropy and lengths.

    Example: topkd cache stats cache --json
    """
    from topkd.offline import profile, stats

    totals, shapes = stats(cache).as_dict(), profile(cache)
    if as_json:
        typer.echo(json.dumps(totals | {"profile": shapes}))
        return
    for line in describe_stats(totals, shapes):
        typer.echo(line)


@app.command("verify")
def verify_command(cache: Folder, as_json: AsJson = False) -> None:
    """Read every byte and list each damaged part; exit code 1 if a saved record may be lost.

    Example: topkd cache verify cache
    """
    from topkd.offline import verify

    found = verify(cache)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    else:
        for item in found.damage:
            place = f"{item.segment} at byte {item.offset}, {item.size} bytes"
            typer.echo(f"{'damage' if item.fatal else 'left by a crash'}: {item.what} ({place})")
        word = "intact" if found.ok else "DAMAGED: score the lost rows again (topkd cache gc removes damaged parts)"
        typer.echo(
            f"{cache}: {count_things(found.records, 'record')} in {count_things(found.segments, 'segment')}, "
            f"{found.bytes:,} bytes, {found.duplicates:,} superseded or duplicate: {word}"
        )
    if not found.ok:
        raise typer.Exit(1)


@app.command("ls")
def ls_command(
    cache: Folder,
    limit: Annotated[int, option("Show at most this many records.", "N", min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """List records: kind, teacher, K, tokens. With --json, one object per line.

    Example: topkd cache ls cache --limit 5
    """
    for number, row in enumerate(islice(_list_records(cache), min(limit + 1, sys.maxsize))):
        if number == limit:
            if not as_json:
                typer.echo("... (--limit shows more)")
            return
        if as_json:
            typer.echo(json.dumps(row))
        else:
            first = " ".join(map(str, row["first_ids"]))
            typer.echo(
                f"{row['kind']:<8} {row['teacher']:<20} K {row['k']:<4} {row['tokens']:>6} tokens "
                f"from {row['start']:<5} {row['codec']:<7} {first} .."
            )


@app.command("gc")
def gc_command(
    cache: Folder,
    codec: Annotated[Codec | None, option("Re-encode the records as packed, raw or cold.", "NAME")] = None,
    foreign: Annotated[
        bool, flag("--foreign", "Also clean up after crashed writers on other machines, if nobody is writing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite a cache without superseded, duplicate and damaged records.

    Example: topkd cache gc cache --codec cold
    """
    from topkd.offline import gc as compact

    _print_exchange(compact(cache, codec=codec, foreign=foreign), as_json)


@app.command("merge")
def merge_command(
    sources: Annotated[list[Path], typer.Argument(help="Caches to copy from.", metavar="CACHE")],
    out: Annotated[Path, option("The cache that receives the records.", "CACHE")],
    as_json: AsJson = False,
) -> None:
    """Copy the records of other caches into one, byte for byte.

    Example: topkd cache merge shard-1 shard-2 --out cache
    """
    from topkd.offline import merge as joined

    _print_exchange(joined(sources, out), as_json)


@app.command("export")
def export_cache_command(
    cache: Folder,
    out: Annotated[Path, typer.Argument(help="Folder for the files.", metavar="FOLDER")],
    form: Annotated[Literal["parquet", "dataset"], option("parquet or dataset.", "NAME", "--format")] = "parquet",
    as_json: AsJson = False,
) -> None:
    """Write scores and rollouts as Parquet, or the scores as a Hugging Face dataset.

    Example: topkd cache export cache exported --format parquet
    """
    from topkd.offline import export_parquet, to_dataset
    from topkd.offline.exchange.exchange import convert_write_errors
    from topkd.offline.store.folder import FORMAT_FILE

    if (out / FORMAT_FILE).exists():
        raise ConfigError("the folder to export to is a cache", where=str(out), hint="choose another one")
    if form == "parquet":
        done = export_parquet(cache, out)
        _print_exchange(done, as_json)
        if done.refused:
            raise typer.Exit(1)
        return
    dataset = to_dataset(cache)
    with convert_write_errors(out):
        dataset.save_to_disk(str(out))
    typer.echo(json.dumps({"records": len(dataset)}) if as_json else f"{len(dataset)} scores in {out}")


@app.command("import")
def import_command(
    cache: Folder,
    source: Annotated[Path, typer.Argument(help="File or folder with scores.", metavar="SOURCE")],
    form: Annotated[
        Literal["parquet", "dataset", "axolotl", "distillkit"],
        option("Format of the source: parquet, dataset, axolotl or distillkit.", "NAME", "--format"),
    ] = "parquet",
    teacher: Annotated[str | None, option("Name of the teacher, if the source has none.", "NAME")] = None,
    revision: Annotated[str, option("Version of that teacher's weights; part of the cache's keys.", "TEXT")] = "",
    codec: Annotated[Codec, option("Encoding of the records: packed, raw or cold.", "NAME")] = "packed",
    as_json: AsJson = False,
) -> None:
    """Import scores into a cache; invalid rows are listed, and the exit code is then 1.

    Example: topkd cache import cache captured --format distillkit --teacher NAME
    """
    from topkd.offline import ScoreStore, TeacherIdentity, from_dataset, import_axolotl, import_distillkit
    from topkd.offline import import_parquet as parquet
    from topkd.offline.store.folder import begin_cache

    if not source.exists():
        raise DataError("no such file or folder", where=str(source), expected="something to import")
    with begin_cache(cache), ScoreStore(cache, mode="a", codec=codec) as store:
        if form == "parquet":
            done = parquet(source, store)
        elif form == "dataset":
            done = from_dataset(_load_dataset(source), store)
        elif teacher is None:
            raise ConfigError(f"--format {form} needs --teacher", hint="the source does not contain the teacher's name")
        elif form == "axolotl":
            identity = TeacherIdentity(teacher, revision=revision)
            done = import_axolotl(_iter_plain_rows(source), store, identity, where=str(source))
        else:
            done = import_distillkit(source, store, TeacherIdentity(teacher, revision=revision))
        if not (done.records or done.refused):
            raise DataError("nothing to import", where=str(source), got="no rows")
    _print_exchange(done, as_json)
    if done.refused:
        raise typer.Exit(1)


def _print_exchange(result: Any, as_json: bool) -> None:
    values = dataclasses.asdict(result)
    if as_json:
        typer.echo(json.dumps(values))
        return
    named = {key: value for key, value in values.items() if isinstance(value, list)}
    typer.echo(", ".join(f"{key} {value}" for key, value in values.items() if key not in named))
    for key, items in named.items():
        for item in items[:20]:
            typer.echo(f"  {key}: {item}")
        if len(items) > 20:
            typer.echo(f"  {key}: {len(items) - 20} more (--json lists them)")


def _list_records(cache: Path) -> Iterator[dict[str, Any]]:
    from topkd.offline import ScoreStore
    from topkd.offline.store.codecs import CODEC_NAMES
    from topkd.offline.store.records import KIND_NAMES, ROLLOUT, SCORE
    from topkd.offline.store.tables import read_identities

    names = read_identities(cache)
    with ScoreStore(cache) as store:
        for record in store.records(kinds=(SCORE, ROLLOUT)):
            header = record.header
            who = names.get(header.tag)
            if header.kind == ROLLOUT and not header.start:
                continue  # a request whose completions could not be read back as ids
            ids = record.score()[0] if header.kind == SCORE else record.rollouts()[0].prompt_ids
            yield {
                "kind": KIND_NAMES[header.kind],
                "teacher": "?" if who is None else who.name,
                "revision": "" if who is None else who.revision,
                "k": header.asked,
                "start": header.start if header.kind == SCORE else int(ids.size) - 1,
                "tokens": header.rows,
                "codec": CODEC_NAMES[header.codec],
                "key": header.key.hex(),
                "first_ids": ids[:6].tolist(),
            }


def _load_dataset(path: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ConfigError("a dataset folder needs datasets", hint='pip install "topkd[data]"') from error
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError("not a saved dataset", where=str(path), got=str(error).splitlines()[0]) from error


def _iter_plain_rows(path: Path) -> Iterator[dict[str, Any]]:
    from topkd.compose.data.files import iter_raw_rows, parse_json_object

    for number, raw in iter_raw_rows(path):
        yield parse_json_object(raw, f"{path}:{number}")

"""F7: the score cache against HF datasets (nested lists) and Parquet (fp16, zstd); same fields, one process and thread.

    python benchmarks/bench_store.py [--tokens 200000] [--scale 1000000] [--out benchmarks/results/bench_store.json]

Synthetic scores: Zipf-Mandelbrot ids (half from a topic of the sequence), 60 % confident positions, V = 151,936. Bytes
of the packed codec do not depend on the ids; those of compressed formats do. Every reader ends with the same NumPy
arrays. Files are in the page cache. Times are the best of alternating repeats, by CPU time (and by the clock). HF
datasets are read in whichever of their list and NumPy forms is faster, for random and for sequential reads apart.
``packed`` uses the compiled unpacking where numba is installed, ``packed_numpy`` never does.
``hf_arrow`` (buffers taken from the Arrow table by hand, past the datasets interface) is reported, not a target.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from topkd.offline import ScoreStore, TeacherIdentity, verify
from topkd.offline.store import codecs
from topkd.offline.store.codecs import Unpacker, load_unpacker
from topkd.topk import TopK
from topkd.topk.types import tail_logp

VOCABULARY, ROWS = 151_936, 512
TEACHER = TeacherIdentity("bench")
TARGETS = {
    "random_vs_hf": 40,
    "sequential_vs_hf": 40,
    "bytes_vs_hf": 0.55,
    "random_vs_parquet": 50,
    "sequential_vs_parquet": 3,
    "cold_bytes_vs_parquet": 1.0,
}


def generate(sequences: int, k: int, seed: int = 0) -> list[tuple[np.ndarray, TopK]]:
    rng = np.random.default_rng(seed)
    ranks = np.arange(1, VOCABULARY + 1)
    cumulative = np.cumsum(1.0 / (ranks + 2.7))
    cumulative /= cumulative[-1]
    names = rng.permutation(VOCABULARY).astype(np.int32)
    out = []
    for _ in range(sequences):
        topic = rng.integers(0, VOCABULARY, 2_000)
        drawn = np.searchsorted(cumulative, rng.random((ROWS, 4 * k)))
        drawn = np.where(rng.random(drawn.shape) < 0.5, topic[rng.integers(0, 2_000, drawn.shape)], drawn)
        top = np.empty((ROWS, k), np.int32)
        for row in range(ROWS):
            values, first = np.unique(drawn[row], return_index=True)
            kept = values[np.argsort(first)]
            if len(kept) < k:
                kept = np.concatenate([kept, np.setdiff1d(ranks[: 4 * k], kept)])
            top[row] = names[kept[:k]]
        confident = rng.random(ROWS) < 0.6
        p1 = np.where(confident, 1 - 10 ** -rng.uniform(0.5, 4, ROWS), rng.uniform(0.1, 0.8, ROWS))
        power = rng.uniform(1.2, 2.4, ROWS)[:, None]
        tail_ranks = np.arange(2, k + 1)
        weights = tail_ranks**-power * np.exp(rng.normal(0, 0.2, (ROWS, k - 1)))
        beyond = k ** (1 - power) / (power - 1)  # the rest of the power law, as an integral
        rest = (1 - p1[:, None]) * weights / (weights.sum(1, keepdims=True) + beyond)
        logp = -np.sort(-np.log(np.concatenate([p1[:, None], rest], 1)), axis=1)
        ids = rng.integers(0, VOCABULARY, ROWS + 1).astype(np.int32)
        scores = TopK(0, top, logp.astype(np.float32), ids[1:], logp[:, 1].astype(np.float32), tail_logp(logp))
        out.append((ids, scores))
    return out


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def table_of(data: list[tuple[np.ndarray, TopK]], *, nested: bool, half: bool) -> pa.Table:
    def lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.Array:
        offsets = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), kind))

    def matrices(arrays: list[np.ndarray], kind: pa.DataType) -> pa.Array:
        if not nested:
            return lists([array.reshape(-1) for array in arrays], kind)
        k = arrays[0].shape[1]
        flat = np.concatenate([array.reshape(-1) for array in arrays])
        inner = pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, k, dtype=np.int32), pa.array(flat, kind))
        outer = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
        return pa.ListArray.from_arrays(outer, inner)

    logp = [scores.logp.astype(np.float16) if half else scores.logp for _, scores in data]
    return pa.table(
        {
            "ids": lists([ids for ids, _ in data], pa.int32()),
            "actual_logp": lists([scores.actual_logp for _, scores in data], pa.float32()),
            "tail_logp": lists([scores.tail_logp for _, scores in data], pa.float32()),
            "topk_ids": matrices([scores.ids for _, scores in data], pa.int32()),
            "topk_logp": matrices(logp, pa.float16() if half else pa.float32()),
        }
    )


class Store:
    unpacker = Unpacker(0)  # at once: a second's compilation is not what is measured

    def __init__(self, folder: Path, data, codec: str) -> None:
        begin = time.perf_counter()
        with ScoreStore(folder, mode="a", codec=codec) as store:
            for ids, scores in data:
                store.put(TEACHER, ids, scores)
        self.write_s = time.perf_counter() - begin
        self.bytes, self.sequences = size_of(folder), [ids for ids, _ in data]
        self.k = data[0][1].k
        self.store = ScoreStore(folder)

    def ready(self) -> None:
        codecs.unpacker = self.unpacker

    def random(self, number: int) -> float:
        return float(self.store.get(TEACHER, self.sequences[number], 0, self.k).logp[0, 0])

    def sequential(self) -> float:
        return sum(float(record.score()[1].logp[0, 0]) for record in self.store.records())


class NumpyStore(Store):
    """The same records, unpacked without numba."""

    unpacker = Unpacker(1 << 62)

    def __init__(self, other: Store) -> None:
        self.__dict__.update(other.__dict__)


class Datasets:
    """Arrow on disk, memory-mapped; the faster of its NumPy format and plain lists, which are then made arrays."""

    def __init__(self, folder: Path, data) -> None:
        import datasets
        from datasets.table import InMemoryTable

        begin = time.perf_counter()
        datasets.Dataset(InMemoryTable(table_of(data, nested=True, half=False))).save_to_disk(folder)
        self.write_s = time.perf_counter() - begin
        self.bytes = size_of(folder)
        plain = datasets.load_from_disk(folder)
        self.forms = {"lists": plain, "numpy": plain.with_format("numpy")}
        self.k = data[0][1].k
        self.form, self.best = "lists", {"random": "lists", "sequential": "lists"}

    def arrays(self, row) -> tuple[np.ndarray, ...]:
        lists = [
            np.asarray(row[name], np.int32 if name == "ids" else np.float32)
            for name in ("ids", "actual_logp", "tail_logp")
        ]
        if self.form == "numpy":
            matrix = [
                np.stack(list(row[name])) if row[name].dtype == object else row[name]
                for name in ("topk_ids", "topk_logp")
            ]
        else:
            matrix = [np.array(row["topk_ids"], np.int32), np.array(row["topk_logp"], np.float32)]
        return (*lists, *matrix)

    def random(self, number: int, form: str = "") -> float:
        self.form = form or self.best["random"]
        return float(self.arrays(self.forms[self.form][number])[-1][0, 0])

    def sequential(self, form: str = "") -> float:
        """Row by row, or in batches of 16 (form "batched lists", "batched numpy")."""
        form = form or self.best["sequential"]
        self.form, total = form.removeprefix("batched "), 0.0
        if form == self.form:
            return sum(float(self.arrays(row)[-1][0, 0]) for row in self.forms[form])
        for batch in self.forms[self.form].iter(batch_size=16):
            for number in range(len(batch["ids"])):
                total += float(self.arrays({name: batch[name][number] for name in batch})[-1][0, 0])
        return total


class Arrow:
    """The same files as ``Datasets``, the buffers taken from the Arrow table by hand."""

    def __init__(self, folder: Path, k: int) -> None:
        import datasets

        self.data, self.k = datasets.load_from_disk(folder).with_format("arrow"), k

    def arrays(self, table: pa.Table, row: int) -> tuple[np.ndarray, ...]:
        parts = [table[name].chunk(0)[row].values for name in table.schema.names]
        flat = [part.to_numpy(zero_copy_only=False) for part in parts[:3]]
        return (*flat, *(part.flatten().to_numpy().reshape(-1, self.k) for part in parts[3:]))

    def random(self, number: int) -> float:
        return float(self.arrays(self.data[number : number + 1], 0)[-1][0, 0])

    def sequential(self) -> float:
        tables = self.data.iter(batch_size=16)
        return sum(
            float(self.arrays(table.combine_chunks(), row)[-1][0, 0])
            for table in tables
            for row in range(table.num_rows)
        )


class Parquet:
    """Flat fp16 lists, zstd, byte-stream-split logprobs, 16 sequences a row group."""

    def __init__(self, folder: Path, data) -> None:
        folder.mkdir()
        file = folder / "scores.parquet"
        table = table_of(data, nested=False, half=True)
        begin = time.perf_counter()
        pq.write_table(
            table,
            file,
            row_group_size=16,
            compression="zstd",
            use_dictionary=False,
            column_encoding={"topk_logp.list.element": "BYTE_STREAM_SPLIT"},
        )
        self.write_s = time.perf_counter() - begin
        self.bytes, self.k = size_of(folder), data[0][1].k
        self.file = pq.ParquetFile(file, memory_map=True)

    def arrays(self, table: pa.Table, row: int) -> tuple[np.ndarray, ...]:
        parts = [table[name].chunk(0)[row].values.to_numpy(zero_copy_only=False) for name in table.schema.names]
        return (*parts[:3], parts[3].reshape(-1, self.k), parts[4].reshape(-1, self.k).astype(np.float32))

    def random(self, number: int) -> float:
        table = self.file.read_row_group(number // 16, use_threads=False)
        return float(self.arrays(table, number % 16)[-1][0, 0])

    def sequential(self) -> float:
        total = 0.0
        for group in range(self.file.num_row_groups):
            table = self.file.read_row_group(group, use_threads=False)
            total += sum(float(self.arrays(table, row)[-1][0, 0]) for row in range(table.num_rows))
        return total


def best_rates(sides: dict, sequences: int, repeats: int) -> dict[str, dict[str, float]]:
    """Best of n by CPU time (what the ratios use: one thread, warm pages, a busy machine), and by the clock."""
    rng = np.random.default_rng(1)
    clocks = {"": time.process_time, "wall_": time.perf_counter}
    seconds: dict[tuple[str, str], list[float]] = {}
    reads = {name: 40 if name in {"hf", "parquet"} else 400 for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            numbers = rng.integers(0, sequences, reads[name]).tolist()
            if isinstance(side, Store):
                side.ready()
            works = {
                "random_sequences_per_s": (
                    lambda side=side, numbers=numbers: [side.random(n) for n in numbers],
                    reads[name],
                ),
                "sequential_tokens_per_s": (side.sequential, sequences * ROWS),
            }
            for what, (work, units) in works.items():
                begin = {prefix: clock() for prefix, clock in clocks.items()}
                work()
                for prefix, clock in clocks.items():
                    seconds.setdefault((name, prefix + what), []).append((clock() - begin[prefix]) / units)
    rates: dict[str, dict[str, float]] = {name: {} for name in sides}
    for (name, what), took in seconds.items():
        rates[name][what] = 1 / min(took[1:])
    return rates


def choose_form(hf: Datasets) -> None:
    def took(read, form: str) -> float:
        begin = time.process_time()
        read(form)
        return time.process_time() - begin

    hf.best["random"] = min(hf.forms, key=lambda form: took(lambda f: [hf.random(n, f) for n in range(20)], form))
    ways = [*hf.forms, *(f"batched {form}" for form in hf.forms)]
    hf.best["sequential"] = min(ways, key=lambda form: took(hf.sequential, form))


def distortion(data, folder: Path) -> dict[str, float]:
    """Mean |KL error| over mean KL against a perturbed student, tail bucket included: tail stored, and tail derived."""
    rng = np.random.default_rng(2)
    exact, stored, derived, tails = [], [], [], []
    with ScoreStore(folder) as store:
        for ids, scores in data[:40]:
            back = store.get(TEACHER, ids, 0, scores.k)
            logits = scores.logp.astype(np.float64) + rng.normal(0, 0.4, scores.logp.shape)
            rest = scores.tail_logp.astype(np.float64) + rng.normal(0, 0.4, scores.rows)
            norm = np.log(np.exp(logits).sum(1) + np.exp(rest))
            student, rest = logits - norm[:, None], rest - norm

            def kl(logp, tail, student=student, rest=rest):
                bins = np.concatenate([logp, np.asarray(tail)[:, None]], axis=1).astype(np.float64)
                bins -= np.log(np.exp(bins).sum(axis=1, keepdims=True))
                ours = np.concatenate([student, rest[:, None]], axis=1)
                return np.where(np.isfinite(bins), np.exp(bins) * (np.maximum(bins, -1e9) - ours), 0.0).sum(1)

            exact.append(kl(scores.logp, scores.tail_logp))
            stored.append(kl(back.logp, back.tail_logp))
            derived.append(kl(back.logp, tail_logp(back.logp)))
            with np.errstate(invalid="ignore"):
                tails.append(np.abs(tail_logp(back.logp) - scores.tail_logp))
    truth = np.concatenate(exact)
    off = np.concatenate(tails)
    return {
        "mean_kl": float(truth.mean()),
        "derived_tail_error_nats_p99": float(np.quantile(off[np.isfinite(off)], 0.99)),
        "derived_tail_lost_entirely": float((~np.isfinite(off)).mean()),
        "fp16_tail_stored": float(np.abs(np.concatenate(stored) - truth).mean() / truth.mean()),
        "fp16_tail_derived": float(np.abs(np.concatenate(derived) - truth).mean() / truth.mean()),
    }


def scaling(root: Path, largest: int) -> list[dict[str, float]]:
    """Opening and reading stores of 10^3 records and up, one row of K = 2 each."""
    ids = np.arange(6, dtype=np.int32)
    one = TopK(4, [[1, 2]], np.log([[0.5, 0.25]]), [5], [-1.0], [np.log(0.25)])
    table, records = [], 1_000
    while records <= largest:
        folder = root / f"scale{records}"
        with ScoreStore(folder, mode="a", group_records=1 << 30, group_bytes=1 << 30) as store:
            for number in range(records):
                ids[:2] = divmod(number, 100_000)
                store.put(TEACHER, ids, one)
        opened = []
        for _ in range(7):
            begin = time.process_time()
            store = ScoreStore(folder)
            opened.append(time.process_time() - begin)
        rng, took = np.random.default_rng(3), []
        for number in rng.integers(0, records, 4_000).tolist():
            ids[:2] = divmod(number, 100_000)
            begin = time.process_time()
            assert store.get(TEACHER, ids, 4, 2) is not None
            took.append(time.process_time() - begin)
        row = {"records": records, "open_ms": 1e3 * float(np.median(opened)), "get_us": 1e6 * float(np.median(took))}
        print(row, flush=True)
        table.append(row)
        shutil.rmtree(folder)
        records *= 10
    return table


def writing(data, root: Path) -> dict[str, float]:
    """Durable tokens/s at several group sizes."""
    rates = {}
    for group in (1, 8, 64):
        folder = root / f"group{group}"
        begin = time.perf_counter()
        with ScoreStore(folder, mode="a", group_records=group) as store:
            for ids, scores in data:
                store.put(TEACHER, ids, scores)
        rates[str(group)] = len(data) * ROWS / (time.perf_counter() - begin)
        shutil.rmtree(folder)
    return rates


def scanning(folder: Path) -> dict[str, float]:
    """Bytes per second of ``verify``, and of just summing the same bytes as 64-bit words."""
    files = list(folder.glob("*.tkl"))
    size = sum(file.stat().st_size for file in files)
    best = {"verify": 0.0, "read_and_sum": 0.0}
    for _ in range(5):
        begin = time.perf_counter()
        assert verify(folder).ok
        best["verify"] = max(best["verify"], size / (time.perf_counter() - begin))
        begin = time.perf_counter()
        for file in files:
            np.memmap(file, np.uint64, "r", shape=(file.stat().st_size // 8,)).sum()
        best["read_and_sum"] = max(best["read_and_sum"], size / (time.perf_counter() - begin))
    return {f"{name}_bytes_per_s": rate for name, rate in best.items()}


def machine() -> dict[str, object]:
    import datasets

    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": load_unpacker() is not None,
        "pyarrow": pa.__version__,
        "datasets": datasets.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--scale", type=int, default=1_000_000, help="largest number of records of the scaling table; 0 leaves it out"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_store.json")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    sequences = max(32, options.tokens // ROWS)
    result: dict[str, object] = {"machine": machine(), "tokens": sequences * ROWS, "k": 64}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        per_token: dict[str, dict[str, float]] = {}
        for k in (20, 128, 64):
            data = generate(sequences if k == 64 else 48, k)
            count = len(data) * ROWS
            sides = {
                "hf": Datasets(root / f"hf{k}", data),
                "parquet": Parquet(root / f"parquet{k}", data),
                **{codec: Store(root / f"{codec}{k}", data, codec) for codec in ("packed", "cold", "raw")},
            }
            per_token[str(k)] = {name: side.bytes / count for name, side in sides.items()}
            print(k, per_token[str(k)], flush=True)
        result["bytes_per_token"] = per_token
        result["mean_mass"] = float(np.mean([scores.mass().mean() for _, scores in data]))
        result["write_tokens_per_s"] = {name: count / side.write_s for name, side in sides.items()}
        choose_form(sides["hf"])
        result["hf_form"] = sides["hf"].best
        sides["hf_arrow"] = Arrow(root / "hf64", 64)
        sides["packed_numpy"] = NumpyStore(sides["packed"])
        result["rates"] = rates = best_rates(sides, sequences, options.repeats)
        for name, rate in rates.items():
            print(name, {key: round(value) for key, value in rate.items()}, flush=True)
        result["durable_write_tokens_per_s_by_group"] = writing(data[:100], root)
        result["kl_distortion"] = distortion(data, root / "packed64")
        result["scan"] = scanning(root / "packed64")
        if options.scale:
            result["scaling"] = scaling(root, options.scale)
    fast, slow, bytes_64 = rates["packed"], rates, per_token["64"]
    plain = rates["packed_numpy"]
    ratios = {
        "random_vs_hf": fast["random_sequences_per_s"] / slow["hf"]["random_sequences_per_s"],
        "sequential_vs_hf": fast["sequential_tokens_per_s"] / slow["hf"]["sequential_tokens_per_s"],
        "bytes_vs_hf": bytes_64["packed"] / bytes_64["hf"],
        "random_vs_parquet": fast["random_sequences_per_s"] / slow["parquet"]["random_sequences_per_s"],
        "sequential_vs_parquet": fast["sequential_tokens_per_s"] / slow["parquet"]["sequential_tokens_per_s"],
        "cold_bytes_vs_parquet": bytes_64["cold"] / bytes_64["parquet"],
    }
    result["without_numba"] = {
        f"{what}_vs_{other}": plain[rate] / slow[other][rate]
        for what, rate in (("random", "random_sequences_per_s"), ("sequential", "sequential_tokens_per_s"))
        for other in ("hf", "parquet")
    }
    result["ratios"] = {
        name: {
            "measured": ratio,
            "target": TARGETS[name],
            "met": ratio <= TARGETS[name] if "bytes" in name else ratio >= TARGETS[name],
        }
        for name, ratio in ratios.items()
    }
    print(json.dumps({key: result[key] for key in ("ratios", "without_numba", "kl_distortion", "scan")}, indent=1))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

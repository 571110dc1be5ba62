"""What was acknowledged survives everything a machine does to a process and its files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.offline.samples import same, scored
from tests.offline.writer import TEACHER, item
from topkd.offline import ScoreStore, gc, verify
from topkd.topk import Rollout, SamplingParams

WRITER = str(Path(__file__).with_name("writer.py"))


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, WRITER, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def run(*arguments: object) -> str:
    return subprocess.run(
        [sys.executable, WRITER, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True, timeout=240
    ).stdout


def acknowledged(*files: Path) -> set[int]:
    # A line may be cut by the kill: what was not said whole was not said.
    return {int(line) for file in files if file.exists() for line in file.read_text().split("\n")[:-1]}


def intact(root: Path, numbers: set[int]) -> None:
    with ScoreStore(root) as store:
        for number in numbers:
            ids, scores = item(number)
            found = store.get(TEACHER, ids, scores.start, scores.k)
            assert found is not None, f"item {number} was acknowledged and is lost"
            assert found.actual_logp.tobytes() == scores.actual_logp.tobytes()
            assert np.array_equal(found.ids, scores.ids)
        assert not store.damage


def kill_loop(root: Path, kills: int, writers: int, total: int, seed: int) -> None:
    rng = random.Random(seed)
    acks = [root.parent / f"acks{number}" for number in range(writers)]
    for _ in range(kills):
        processes = [start("write", root, acks[number], number, total) for number in range(writers)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        time.sleep(rng.random() ** 2 * 0.6)  # often while it opens and adopts what the last one left
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
            process.stdout.close()
        if not (root / "topkd-store.json").exists():
            continue
        verification = verify(root)
        assert verification.ok, verification.damage
        said = acknowledged(*acks)
        intact(root, set(rng.sample(sorted(said), min(25, len(said)))))
    for number in range(writers):
        assert run("write", root, acks[number], number, total) == "ready\ndone\n"
    verification = verify(root)
    assert verification.ok
    assert verification.damage == []
    if writers == 1:
        assert verification.duplicates == 0
        assert verification.records == total
    with ScoreStore(root) as store:
        assert len(store) == total
    intact(root, set(range(total)))
    gc(root)
    verification = verify(root)
    assert (verification.records, verification.duplicates, verification.damage) == (total, 0, [])
    intact(root, set(range(total)))


def test_a_writer_killed_at_a_dozen_instants_loses_nothing_acknowledged(tmp_path):
    kill_loop(tmp_path / "cache", kills=8, writers=1, total=400, seed=1)


def test_two_writers_killed_together_lose_nothing_and_leave_one_winner_per_key(tmp_path):
    kill_loop(tmp_path / "cache", kills=4, writers=2, total=300, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("writers", "kills"), [(1, 120), (2, 80)])
def test_writers_killed_at_two_hundred_instants_lose_nothing(tmp_path, writers, kills):
    kill_loop(tmp_path / "cache", kills=kills, writers=writers, total=6_000, seed=writers)


@pytest.fixture
def unsealed(tmp_path):
    """A folder as a killed writer leaves it, and the offsets where its records end."""
    store = ScoreStore(tmp_path / "live", mode="a")
    data = [scored(seed, tokens=8 + seed, k=3, start=2) for seed in range(4)]
    ends = []
    for ids, scores in data:
        store.put(TEACHER, ids, scores)
        store.commit()
        ends.append(next((tmp_path / "live").glob("*.tkl")).stat().st_size)
    copy = tmp_path / "crashed"
    shutil.copytree(tmp_path / "live", copy)  # no lock on the copy: its writer is dead
    store.close()
    return copy, data, ends


def test_a_segment_cut_at_any_byte_gives_its_whole_records_and_goes_on(unsealed, tmp_path):
    crashed, data, ends = unsealed
    segment = next(crashed.glob("*.tkl"))
    whole = segment.read_bytes()
    cuts = set(range(0, len(whole), 37)) | {end + step for end in ends for step in (-65, -1, 0, 1) if end + step >= 0}
    for cut in sorted(cuts):
        root = tmp_path / f"cut{cut}"
        root.mkdir()
        shutil.copy(crashed / "topkd-store.json", root)
        (root / segment.name).write_bytes(whole[:cut])
        expected = sum(end <= cut for end in ends)
        assert verify(root).ok
        assert verify(root).records == expected
        with ScoreStore(root, mode="a", codec="raw") as store:  # adopts, cuts the tail, seals
            assert len(store) == expected
            for ids, scores in data:
                store.put(TEACHER, ids, scores)
            assert len(store) == len(data)
        after = verify(root)
        assert (after.records, after.duplicates, after.damage) == (len(data), 0, [])
        shutil.rmtree(root)


def test_a_torn_tail_is_named_and_not_counted_as_loss(unsealed):
    crashed, _, ends = unsealed
    segment = next(crashed.glob("*.tkl"))
    os.truncate(segment, ends[1] + 100)
    (torn,) = verify(crashed).damage
    assert (torn.segment, torn.offset, torn.fatal) == (segment.name, ends[1], False)
    assert torn.what == "incomplete last record"


def test_garbage_between_records_is_stepped_over_and_named(unsealed):
    crashed, data, ends = unsealed
    segment = next(crashed.glob("*.tkl"))
    whole = bytearray(segment.read_bytes())
    whole[ends[0] : ends[0] + 64] = os.urandom(64)  # the second record's header
    segment.write_bytes(whole)
    verification = verify(crashed)
    assert [(item.offset, item.fatal) for item in verification.damage] == [(ends[0], True)]
    with ScoreStore(crashed, mode="a") as store:
        present = [store.get(TEACHER, ids, 2, 3) is not None for ids, _ in data]
        assert present == [True, False, True, True]
        store.put(TEACHER, *data[1])
        assert store.get(TEACHER, data[1][0], 2, 3) is not None


def test_every_bit_flip_is_named_and_harms_only_the_record_it_hits(tmp_path):
    root = tmp_path / "cache"
    data = [scored(seed, tokens=20, k=6, start=2, odd=True) for seed in range(12)]
    with ScoreStore(root, mode="a", codec="raw") as store:
        for ids, scores in data:
            store.put(TEACHER, ids, scores)
    files = [*root.glob("*.tkl"), *root.glob("*.idx")]
    rng = random.Random(5)
    for _ in range(150):
        file = rng.choice(files)
        whole = bytearray(file.read_bytes())
        at = rng.randrange(len(whole))
        whole[at] ^= 1 << rng.randrange(8)
        original = file.read_bytes()
        file.write_bytes(whole)
        named = verify(root).damage
        assert named, f"a flip at {at} of {file.name} was not noticed"
        assert all(item.segment == file.name for item in named)
        if file.suffix == ".tkl":
            assert any(item.offset <= at < item.offset + item.size for item in named)
        with ScoreStore(root) as store:
            found = [store.get(TEACHER, ids, 2, 6) for ids, _ in data]
            assert sum(scores is None for scores in found) <= 1
            assert all(scores is None or same(scores, data[n][1]) for n, scores in enumerate(found))
        file.write_bytes(original)


def test_a_damaged_record_is_written_again_by_whoever_has_its_values_unread_as_it_is(tmp_path):
    data = [scored(seed, tokens=20, k=6, start=2) for seed in range(3)]
    params = SamplingParams(max_tokens=14, seed=1)
    drawn = [Rollout(ids[:6], ids[6:], scores.actual_logp[3:], "stop", params) for ids, scores in data]

    def keep(root):
        with ScoreStore(root, mode="a") as store:
            for (ids, scores), rollout in zip(data, drawn, strict=True):
                store.put(TEACHER, ids, scores)
                store.put_rollouts(TEACHER, ids[:6], [rollout], params)
        with ScoreStore(root) as store:
            return sum(1 for _ in store.records(kinds=(1, 2)))

    assert keep(tmp_path) == 6
    segment = next(tmp_path.glob("*.tkl"))
    whole = bytearray(segment.read_bytes())
    whole[whole.index(data[1][1].actual_logp.tobytes())] ^= 1  # in a score
    whole[whole.rindex(drawn[2].logp.tobytes())] ^= 1  # in a rollout, which stands behind the score
    segment.write_bytes(whole)
    with ScoreStore(tmp_path) as store:
        assert sum(1 for _ in store.records(kinds=(1, 2))) == 4
    assert keep(tmp_path) == 6


def test_a_damaged_record_is_scored_again_and_compacted_away(tmp_path):
    data = [scored(seed, tokens=20, k=6, start=2) for seed in range(3)]
    with ScoreStore(tmp_path, mode="a") as store:
        for ids, scores in data:
            store.put(TEACHER, ids, scores)
    segment = next(tmp_path.glob("*.tkl"))
    whole = bytearray(segment.read_bytes())
    whole[-200] ^= 1
    segment.write_bytes(whole)
    with ScoreStore(tmp_path, mode="a") as store:
        assert store.get(TEACHER, data[2][0], 2, 6) is None
        assert "checksum" in store.damage[0]
        assert segment.name in store.damage[0]
        store.put(TEACHER, *data[2])
        assert store.get(TEACHER, data[2][0], 2, 6) is not None
    assert not verify(tmp_path).ok
    done = gc(tmp_path)
    assert len(done.damage) == 1
    after = verify(tmp_path)
    assert (after.records, after.damage) == (3, [])


def test_a_sealed_segment_cut_short_says_how_many_records_are_lost(tmp_path):
    with ScoreStore(tmp_path, mode="a") as store:
        for number in range(1, 6):
            store.put(TEACHER, *item(number))
    segment = next(tmp_path.glob("*.tkl"))
    size = segment.stat().st_size
    os.truncate(segment, size // 2)
    verification = verify(tmp_path)
    assert not verification.ok
    assert any("truncated" in damage.what and "lost" in damage.what for damage in verification.damage)
    with ScoreStore(tmp_path) as store:
        present = [store.get(TEACHER, item(number)[0], 5, 4) is not None for number in range(1, 6)]
    assert present == sorted(present, reverse=True)
    assert 0 < sum(present) < 5


def test_a_lost_or_damaged_index_costs_no_record(tmp_path):
    with ScoreStore(tmp_path, mode="a") as store:
        for number in range(1, 6):
            store.put(TEACHER, *item(number))
    index = next(tmp_path.glob("*.idx"))
    index.write_bytes(index.read_bytes()[:-5])
    intact(tmp_path, {1, 2, 3, 4, 5})
    assert verify(tmp_path).damage[0].segment == index.name
    gc(tmp_path)
    assert verify(tmp_path).damage == []
    for each in tmp_path.glob("*.idx"):
        each.unlink()
    intact(tmp_path, {1, 2, 3, 4, 5})
    with ScoreStore(tmp_path, mode="a"):
        assert list(tmp_path.glob("*.idx"))  # sealed again


@pytest.mark.parametrize("limit", [5_000, 70_000, 100_001])
def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path, limit):
    root = tmp_path / "cache"
    count, error = run("fill", root, limit, 60).split(" ", 1)
    assert int(count) < 60
    assert "cannot write to the cache" in error
    assert "free some space" in error
    verification = verify(root)
    assert verification.damage == []
    assert verification.records == int(count)
    intact(root, set(range(int(count))))
    assert run("fill", root, 0, 60).startswith("60 no error")
    after = verify(root)
    assert (after.records, after.duplicates, after.damage) == (60, 0, [])


def test_a_really_full_file_system_loses_nothing(tmp_path):
    root = tmp_path / "small"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", root], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        count, error = run("fill", root, 0, 60).split(" ", 1)
        assert "No space left on device" in error
        assert verify(root).damage == []
        intact(root, set(range(int(count))))
    finally:
        subprocess.run(["umount", root], check=True)


def test_a_read_only_folder_can_be_read_and_refuses_writes_clearly(tmp_path):
    with ScoreStore(tmp_path, mode="a") as store:
        store.put(TEACHER, *item(1))
    tmp_path.chmod(0o555)
    try:
        found, error = run("readonly", tmp_path).split(" ", 1)
    finally:
        tmp_path.chmod(0o755)
    assert found == "True"
    assert "cannot write to the cache" in error
    assert "Permission denied" in error


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch):
    now = iter(range(10**18, 0, -(10**15)))
    monkeypatch.setattr(time, "time_ns", lambda: next(now))
    monkeypatch.setattr(time, "time", lambda: next(now) / 1e9)
    for number in range(1, 8):
        with ScoreStore(tmp_path, mode="a") as store:
            store.put(TEACHER, *item(number))
            os.utime(next(tmp_path.glob("*.tkl")), (number, 10**9 - number))
    intact(tmp_path, set(range(1, 8)))
    verification = verify(tmp_path)
    assert (verification.records, verification.duplicates, verification.damage) == (7, 0, [])

"""A run that is killed at random moments and resumed each time. Run as a program: see ``main``.

One warm process forks each leg, so a leg costs what its steps cost. What was asked of the teacher and what was kept in
the cache is written to a log in the order in which it happened; lines of a killed process stay.
"""

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers  # noqa: F401 - imported once, before the forks

from topkd.clients.dialects.vllm import VllmCompletions
from topkd.compose.config.run_config import RunConfig
from topkd.compose.progress import Progress
from topkd.compose.train import train
from topkd.engine.checkpoint.snapshots import find_fault
from topkd.offline import ScoreStore

EARLY = 0.2  # share of the kills that come at any moment since the process began, also before its first step


def main(config_path: str, out: str, kills: str, seed: str) -> None:
    """Kill the run ``kills`` times, then let it end. Prints what happened as JSON."""
    torch.set_num_threads(1)
    config = RunConfig.model_validate_json(Path(config_path).read_text())
    folder, rng = Path(out), random.Random(seed)
    folder.mkdir(parents=True)
    log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    _log_requests(log)
    killed, before_a_step, reached, faults = 0, 0, 0, []
    while True:
        child = _leg(config, folder, resume=(folder / "config.json").exists())
        if killed == int(kills):
            _, status = os.waitpid(child, 0)
            assert status == 0, f"the last leg ended with {status}"
            break
        early = rng.random() < EARLY
        if not early:
            _until(folder, reached + rng.randint(1, 3), child)
        time.sleep(rng.uniform(0.0, 1.0 if early else 0.08))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the run ended by itself before it had been killed {kills} times"
        killed += 1
        before_a_step += _steps(folder) == reached and early
        reached = max(reached, _kept(folder))
        faults += [fault for path in folder.glob("checkpoints/step-*") if (fault := find_fault(path)) is not None]
    print(json.dumps({"killed": killed, "before_a_step": before_a_step, "faults": faults}))


class Ear(Progress):
    """Notes of every leg, to standard error."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _leg(config: RunConfig, folder: Path, *, resume: bool) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        asyncio.run(train(config, folder, Ear(), resume=resume))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _log_requests(log: int) -> None:
    """Write "asked KEY" before a score is asked for and "kept KEY" once it is on disk."""
    score, put = VllmCompletions.score, ScoreStore.put

    def line(what: str, ids) -> None:
        key = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=8).hexdigest()
        os.write(log, f"{what} {key}\n".encode())

    async def asked(self, ids, start, k):
        if start > 0:  # from 0 on, a start asks a line of text for K and the tokenizer: no sample of the run
            line("asked", ids)
        return await score(self, ids, start, k)

    def kept(self, identity, ids, *args, **more):
        found = put(self, identity, ids, *args, **more)
        line("kept", ids)
        return found

    VllmCompletions.score, ScoreStore.put = asked, kept


def _steps(folder: Path) -> int:
    run_log = folder / "metrics.jsonl"
    return run_log.read_bytes().count(b'{"kind": "step"') if run_log.exists() else 0


def _kept(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoints/step-*")), default=0)


def _until(folder: Path, step: int, child: int) -> None:
    while _steps(folder) < step:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            raise AssertionError("a leg ended by itself")
        time.sleep(0.005)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""TRL's own parse of a scoring reply, timed in the environment it is installed in: a side of ``bench_decode.py``.

Reads ``body`` and ``ask.json`` of the folder it is given; then each line of standard input is one turn, answered with
its seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from trl.generation.vllm_client import VLLMClient


def main() -> None:
    folder = Path(sys.argv[1])
    body = (folder / "body").read_bytes()
    asked = json.loads((folder / "ask.json").read_text())

    def parse() -> object:
        choice = json.loads(body)["choices"][0]
        return VLLMClient._format_sequence_logprobs(choice, asked["ids"], 1, asked["k"])  # noqa: SLF001 - it is measured

    parse()
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.process_time()
        parse()
        print(time.process_time() - begun, flush=True)


if __name__ == "__main__":
    main()

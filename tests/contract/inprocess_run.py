"""Runs inside the vLLM venv: ``topkd train`` with the student sampled by vLLM in this process.

Usage: python inprocess_run.py ROOT EXTRA CONFIG.json OUT   (EXTRA: site-packages with what this venv lacks, asked last)
"""

from __future__ import annotations

import asyncio
import json
import sys


async def main(root: str, extra: str, config_path: str, out: str) -> None:
    sys.path.insert(0, root)
    sys.path.append(extra)
    from pathlib import Path

    from topkd.compose.config.run_config import RunConfig
    from topkd.compose.train import train

    await train(RunConfig.model_validate(json.loads(Path(config_path).read_text())), Path(out))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

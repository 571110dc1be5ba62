"""The commands: a thin skin on ``topkd.compose``."""

from topkd.cli.app import main

__all__ = ["main"]

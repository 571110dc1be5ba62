"""The commands: a thin layer over ``topkd.compose``."""

from topkd.cli.app import main

__all__ = ["main"]

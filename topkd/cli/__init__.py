"""The commands: a thin skin on ``topkd.compose``."""

"""One training run in a folder: lock, run log, checkpoints, observers.

Knows: the engine. Does not know: command lines.
"""

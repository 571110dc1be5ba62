"""Checkpoints: each is written completely or not at all, and read back exactly.

Knows: files and the learner's state. Does not know: where batches come from.
"""

"""Checkpoints: written in one piece, read back exactly.

Knows: files and the learner's state. Does not know: where batches come from.
"""

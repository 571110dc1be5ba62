"""The maths on top-K lists, in NumPy: advantages, divergences, estimator.

Knows: arrays. Does not know: torch, files, servers.
"""

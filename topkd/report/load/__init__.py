"""Reads run folders and comparisons as records.

Knows: the files of a run folder. Does not know: what they mean.
"""

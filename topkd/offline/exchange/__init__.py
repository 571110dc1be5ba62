"""Caches to and from Parquet, datasets, and other projects' column layouts.

Knows: pyarrow. Does not know: how segments lie on disk.
"""

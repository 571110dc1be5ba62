"""Import and export of caches: Parquet, datasets, and other projects' column layouts.

Knows: pyarrow, stores. Does not know: the layout of segments on disk.
"""

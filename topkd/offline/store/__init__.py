"""The score cache on disk: keys, records, segments, index.

Knows: bytes, checksums, locks. Does not know: teachers, HTTP, other formats.
"""

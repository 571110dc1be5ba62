"""Parts of the demo: corpus, tiny models, folders.

Knows: torch. Does not know: runs.
"""

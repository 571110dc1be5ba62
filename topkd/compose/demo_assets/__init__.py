"""Parts of the demo: corpus, tiny models, folders.

Knows: torch. Does not know: how a run goes.
"""

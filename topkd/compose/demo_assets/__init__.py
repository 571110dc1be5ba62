"""What the demo is made of: corpus, tiny models, folders.

Knows: torch. Does not know: how a run goes.
"""

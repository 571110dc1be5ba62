"""The training loop: sample, score, learn, publish weights, evaluate.

Knows: asyncio. Does not know: the internals of models.
"""

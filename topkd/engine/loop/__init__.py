"""The order of things: sample, score, learn, publish, evaluate.

Knows: asyncio. Does not know: models' insides.
"""

"""Several replicas as one scorer: routing, fail-over, hedging.

Knows: scorers. Does not know: reply formats.
"""

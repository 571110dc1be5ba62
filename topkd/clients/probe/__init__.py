"""What can this endpoint do: about forty small requests and a verdict.

Knows: every dialect. Does not know: training.
"""

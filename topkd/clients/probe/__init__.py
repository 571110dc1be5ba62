"""``topkd probe``: find out what a server can do, with about forty small requests.

Knows: every dialect. Does not know: training.
"""

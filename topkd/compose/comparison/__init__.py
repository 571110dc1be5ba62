"""Comparisons: matched runs over arms and seeds, and their statistics.

Knows: cells and statistics. Does not know: how a page is drawn.
"""

"""Matched runs over arms and seeds, and what they show together.

Knows: cells and statistics. Does not know: how a page is drawn.
"""

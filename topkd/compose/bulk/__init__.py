"""Bulk jobs: score and sample many rows into a cache.

Knows: one pump, one spending limit. Does not know: training.
"""

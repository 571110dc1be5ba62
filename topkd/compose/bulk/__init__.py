"""Bulk jobs: score and sample many rows into a cache.

Knows: the loop of a job and its spending limit. Does not know: training.
"""

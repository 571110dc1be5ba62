"""Analysis of runs: outcomes, verdicts, intervals, tables.

Knows: records. Does not know: HTML.
"""

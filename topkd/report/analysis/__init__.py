"""What runs show: outcomes, verdicts, intervals, tables.

Knows: records. Does not know: HTML.
"""

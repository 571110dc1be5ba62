"""Reports: HTML pages and figures about runs.

Knows: finished metrics. Does not know: how they were made.
"""

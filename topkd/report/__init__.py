"""Reports: HTML pages and figures about runs.

Knows: run logs. Does not know: how runs are made.
"""

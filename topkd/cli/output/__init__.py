"""Output of the commands: progress, summaries, tables.

Knows: rich, and the results of ``topkd.compose``. Does not know: options.
"""

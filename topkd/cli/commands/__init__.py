"""One file per command: its options, and the call into ``topkd.compose``.

Knows: typer. Does not know: how results are formatted.
"""

"""One self-contained HTML page, and figures.

Knows: jinja2 and the templates. Does not know: how runs are ranked.
"""

"""Run files: tables, overrides, and errors in plain words.

Knows: pydantic and TOML. Does not know: models, servers, rows.
"""

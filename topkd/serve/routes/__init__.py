"""HTTP routes of every dialect: they check requests and build replies.

Knows: starlette. Does not know: torch.
"""

"""HTTP routes of every dialect: requests checked, replies built.

Knows: starlette. Does not know: torch.
"""

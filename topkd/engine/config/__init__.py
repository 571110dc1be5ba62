"""Settings of sampling, learning and objectives.

Knows: pydantic. Does not know: torch.
"""

"""Weight updates for servers, over HTTP or shared folders.

Knows: update routes. Does not know: torch models.
"""

"""Decoding of replies into checked arrays.

Knows: the reply formats of every server. Does not know: HTTP, retries, which server is asked.
"""

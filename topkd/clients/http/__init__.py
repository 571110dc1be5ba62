"""Sending requests: pools, retries, admission, deadlines, secrets.

Knows: httpx and tenacity. Does not know: dialects.
"""

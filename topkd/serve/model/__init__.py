"""A Hugging Face model as the server runs it: loading, adapters, weight updates.

Knows: torch. Does not know: requests.
"""

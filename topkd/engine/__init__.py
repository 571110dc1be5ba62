"""Moving samples and taking steps.

Knows: torch, the student, the order of things. Does not know: HTTP, files of scores.
"""

"""Batches of scoring and sampling work on one model.

Knows: queues and the model. Does not know: HTTP.
"""

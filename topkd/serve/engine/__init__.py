"""Batched scoring and sampling on one model.

Knows: queues and the model. Does not know: HTTP.
"""

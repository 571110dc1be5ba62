"""A batch of scored samples to one step of the optimizer.

Knows: torch, losses, ranks. Does not know: where batches come from.
"""

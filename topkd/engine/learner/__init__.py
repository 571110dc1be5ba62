"""One optimiser step on a batch of scored samples: losses, batching, several processes.

Knows: torch, losses, ranks. Does not know: where batches come from.
"""

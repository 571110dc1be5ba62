"""What people look at. Knows: finished metrics. Does not know: how they came about."""

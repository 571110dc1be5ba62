"""The teachers of a run, opened: served, local, cached.

Knows: clients and local models. Does not know: the training loop.
"""

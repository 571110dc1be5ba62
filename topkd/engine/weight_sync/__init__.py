"""New weights to the sampler's server, checked.

Knows: weight sinks. Does not know: HTTP.
"""

"""Send new weights to the sampler's server, and check them.

Knows: weight sinks. Does not know: HTTP.
"""

"""One file a dialect: build a request, check a reply.

Knows: what each server can be asked. Does not know: fleets, probes.
"""

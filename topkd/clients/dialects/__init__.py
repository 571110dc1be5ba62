"""One file for each dialect (the API of a kind of server): build requests, parse replies.

Knows: what each server can be asked. Does not know: fleets, probes.
"""

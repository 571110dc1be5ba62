"""Everything that can be checked before a model is loaded.

Knows: configs, prompts, servers. Does not know: the run's folder.
"""

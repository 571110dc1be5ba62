"""The score cache as runs use it: identities, recording, replay.

Knows: ``topkd.offline``. Does not know: servers.
"""

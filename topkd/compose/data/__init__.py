"""Rows of files as token ids: prompts, chats, completions.

Knows: tokenizers and chat templates. Does not know: teachers.
"""

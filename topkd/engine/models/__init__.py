"""Student and teachers as torch models: load, sample, measure.

Knows: transformers and peft. Does not know: the loop.
"""

"""topkd: distil a teacher you can reach only through an API.

The rooms, and what each knows:

* ``topkd.topk`` - what a top-K logprob is, and all the maths on it (torch only in ``losses``, ``fused``, ``schedule``).
* ``topkd.clients`` - how servers say it: one dialect a file, one transport, one retry owner.
* ``topkd.engine`` - moving samples and taking steps.
* ``topkd.offline`` - never ask twice: the score cache and replay.
* ``topkd.serve`` - the embedded server: any Hugging Face causal LM behind vLLM's dialects.
* ``topkd.report`` - what people look at.
* ``topkd.compose`` - the rooms plugged together from one frozen config.
* ``topkd.cli`` - the commands, a thin skin on ``compose``.

Importing ``topkd`` loads neither torch nor vllm nor transformers.
"""

__version__ = "0.1.0"

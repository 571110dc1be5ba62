"""Tiny random causal LMs with a byte-level BPE tokenizer trained on the standard library's own sources.

Every model made with the same ``vocab`` shares one tokenizer, so any of them can teach any other. The same arguments
give the same weights and the same merges on one Python version.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 4096


def corpus_files(count: int = 60) -> list[str]:
    """The first ``count`` top-level modules of the standard library, by name."""
    return [str(path) for path in sorted(Path(os.__file__).parent.glob("*.py"))[:count]]


@lru_cache(maxsize=4)
def _trained(vocab: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train(corpus_files(), trainer)
    return str(tokenizer.to_str())


def make_tokenizer(vocab: int = 2048) -> Any:
    """A ``PreTrainedTokenizerFast`` of exactly ``vocab`` ids: specials 0-2, 256 bytes, then merges; ChatML template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == vocab, f"the corpus gave {len(fast)} ids, not {vocab}"
    return fast


def make_tiny_model(
    path: str | Path,
    *,
    arch: Literal["qwen2", "llama"] = "qwen2",
    seed: int = 1,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 2048,
    padded_vocab: int | None = None,
    std: float = 0.35,
    tie: bool = False,
) -> Path:
    """Save a random float32 model and its tokenizer under ``path`` and return the folder.

    ``std`` is large so that the distributions are peaked like a trained model's (3-5 nats) instead of uniform.
    ``padded_vocab`` makes the logits wider than the tokenizer, as Qwen's are. Set ``vocab`` and ``std`` the same for
    teacher and student; different seeds give different weights. The global torch RNG is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(vocab)
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[arch]
    config = config_class(
        vocab_size=padded_vocab or vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=std,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""The HTTP dialects that score given ids: what a teacher behind a URL, or a fleet of them, can be made of."""

from __future__ import annotations

from topkd.clients.dialects.fireworks import FireworksEcho
from topkd.clients.dialects.sglang import Sglang
from topkd.clients.dialects.vllm import VllmCompletions
from topkd.clients.dialects.vllm_generate import VllmGenerate

ScoringClient = VllmCompletions | Sglang | FireworksEcho
DIALECTS: dict[str, type[ScoringClient]] = {
    "vllm": VllmCompletions,
    "vllm_generate": VllmGenerate,
    "sglang": Sglang,
    "fireworks": FireworksEcho,
}

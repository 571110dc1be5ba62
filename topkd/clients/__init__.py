"""Clients of model servers: requests, and checked replies.

Knows: HTTP, dialects, retries. Does not know: losses, training, caches.

Names are imported when they are first used: ``import topkd.clients`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topkd.clients.config import ClientConfig
    from topkd.clients.connection import connect
    from topkd.clients.dialects.base import ServerInfo
    from topkd.clients.dialects.fireworks import FireworksEcho
    from topkd.clients.dialects.openai import OpenAIChat
    from topkd.clients.dialects.sglang import Sglang
    from topkd.clients.dialects.tinker import TinkerClient
    from topkd.clients.dialects.vllm import VllmCompletions
    from topkd.clients.dialects.vllm_generate import VllmGenerate
    from topkd.clients.dialects.vllm_inprocess import VllmInProcess
    from topkd.clients.fleet.fleet import Fleet
    from topkd.clients.weights.sinks import SglangWeightSink, VllmWeightSink

_HOMES = {
    "ClientConfig": "config",
    "FireworksEcho": "dialects.fireworks",
    "Fleet": "fleet.fleet",
    "OpenAIChat": "dialects.openai",
    "ServerInfo": "dialects.base",
    "Sglang": "dialects.sglang",
    "SglangWeightSink": "weights.sinks",
    "TinkerClient": "dialects.tinker",
    "VllmCompletions": "dialects.vllm",
    "VllmGenerate": "dialects.vllm_generate",
    "VllmInProcess": "dialects.vllm_inprocess",
    "VllmWeightSink": "weights.sinks",
    "connect": "connection",
}
__all__ = [
    "ClientConfig",
    "FireworksEcho",
    "Fleet",
    "OpenAIChat",
    "ServerInfo",
    "Sglang",
    "SglangWeightSink",
    "TinkerClient",
    "VllmCompletions",
    "VllmGenerate",
    "VllmInProcess",
    "VllmWeightSink",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

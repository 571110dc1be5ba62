"""How servers say it. Knows: HTTP, dialects, retries. Does not know: losses, training, caches.

Names are imported when they are first used: ``import topkd.clients`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topkd.clients.config import ClientConfig
    from topkd.clients.connection import connect
    from topkd.clients.dialect import ServerInfo
    from topkd.clients.fireworks import FireworksEcho
    from topkd.clients.fleet import Fleet
    from topkd.clients.openai import OpenAIChat
    from topkd.clients.router import TeacherRouter
    from topkd.clients.sglang import Sglang
    from topkd.clients.stream import Done, Job, Stream
    from topkd.clients.sync import FleetWeightSink, SglangWeightSink, VllmWeightSink
    from topkd.clients.tinker import TinkerClient
    from topkd.clients.vllm import VllmCompletions
    from topkd.clients.vllm_generate import VllmGenerate
    from topkd.clients.vllm_inprocess import VllmInProcess

_HOMES = {
    "ClientConfig": "config",
    "Done": "stream",
    "FireworksEcho": "fireworks",
    "Fleet": "fleet",
    "FleetWeightSink": "sync",
    "Job": "stream",
    "OpenAIChat": "openai",
    "ServerInfo": "dialect",
    "Sglang": "sglang",
    "SglangWeightSink": "sync",
    "Stream": "stream",
    "TeacherRouter": "router",
    "TinkerClient": "tinker",
    "VllmCompletions": "vllm",
    "VllmGenerate": "vllm_generate",
    "VllmInProcess": "vllm_inprocess",
    "VllmWeightSink": "sync",
    "connect": "connection",
}
__all__ = [
    "ClientConfig",
    "Done",
    "FireworksEcho",
    "Fleet",
    "FleetWeightSink",
    "Job",
    "OpenAIChat",
    "ServerInfo",
    "Sglang",
    "SglangWeightSink",
    "Stream",
    "TeacherRouter",
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

"""A stand-in for SGLang's CUDA kernels: every name imports, and a name that is called raises.

SGLang 0.5.23 with ``--device cpu`` imports names from here and, without AMX, takes its torch paths instead.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: object, **_options: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} was called, and this stand-in has no kernels")

    return missing

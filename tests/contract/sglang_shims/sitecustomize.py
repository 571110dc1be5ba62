"""Lets SGLang 0.5.23 start on a CPU build of torch, from its own wheel and packages of PyPI.

Put on PYTHONPATH of the server. Each repair runs just before the module that needs it is imported.
"""

import importlib.abc
import importlib.util
import sys
import types


def _declare_torchvision_operators():
    """Declare two operators: PyPI's torchvision is linked with CUDA, so its own do not load beside a CPU torch."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # kept alive: the declarations end with it


def _replace_triton():
    """Install the stand-in for Triton (1 GB) that SGLang ships for macOS: no kernel of it runs on a CPU."""
    (folder,) = importlib.util.find_spec("sglang").submodule_search_locations
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", f"{folder}/_platform_stubs.py")
    stubs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs
    spec.loader.exec_module(stubs)
    import torch

    # It installs itself on Apple silicon only: for the length of the call, this is one.
    stubs.sys = types.SimpleNamespace(platform="darwin", modules=sys.modules, meta_path=sys.meta_path)
    stubs.platform = types.SimpleNamespace(machine=lambda: "arm64")
    stubs._patch_non_blocking = lambda: None
    is_available = torch.backends.mps.is_available
    torch.backends.mps.is_available = lambda: True
    try:
        stubs.install_platform_stubs()
    finally:
        torch.backends.mps.is_available = is_available


def _ignore_pinned_memory():
    """Leave memory unpinned: LoRA asks for pinned memory, and a CPU build of torch refuses it."""
    import torch

    for name in ("tensor", "empty", "zeros"):
        plain = getattr(torch, name)
        setattr(torch, name, lambda *args, pin_memory=False, _plain=plain, **options: _plain(*args, **options))
    torch.Tensor.pin_memory = lambda self, *_args, **_options: self


class _Repairs(importlib.abc.MetaPathFinder):
    """Finds no module; runs a repair when the module that needs it is about to be imported."""

    def __init__(self):
        self.results = []
        self.pending = {
            "torchvision._meta_registrations": _declare_torchvision_operators,
            "sglang.srt.environ": _replace_triton,
            "sglang.srt.lora": _ignore_pinned_memory,
        }

    def find_spec(self, name, path=None, target=None):
        repair = self.pending.pop(name, None)
        if repair is not None:
            self.results.append(repair())
        return


sys.meta_path.insert(0, _Repairs())

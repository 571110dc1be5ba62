"""As the package: SGLang imports this module by name."""

from sgl_kernel import __getattr__  # noqa: F401 - its answer to every name

"""Run inside a clean environment that has only the wheel: python -I check_wheel.py DIST_DIR SOURCE_ROOT."""

import importlib
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

PUBLIC = ["topkd", "topkd.topk", "topkd.clients", "topkd.offline"]
HEAVY = ["torch", "vllm", "transformers"]


def check_contents(dist: Path, source: Path) -> None:
    """The archives hold the whole package and its licence, and nothing of the tests or of this machine."""
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    inside = zipfile.ZipFile(wheel).namelist()
    stray = [name for name in inside if not name.startswith(("topkd/", "topkd-"))]
    assert not stray, f"the wheel holds more than the package: {stray[:5]}"
    package = (path for path in (source / "topkd").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    lacking = {path.relative_to(source).as_posix() for path in package} - set(inside)
    assert not lacking, f"the wheel lacks {sorted(lacking)[:5]}"
    assert "topkd/py.typed" in inside, "the wheel lacks py.typed"
    assert any(name.endswith("licenses/LICENSE") for name in inside), "the wheel lacks its licence"
    assert not [name for name in inside if name.endswith((".pyc", ".so"))], "the wheel holds build leftovers"
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "topkd/py.typed"} <= names, (
        "the sdist is not whole"
    )


def check_public_names(source: Path) -> int:
    """Every name that a public module promises is there, from the wheel and not from the source tree."""
    count = 0
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        origin = Path(module.__file__ or "").resolve()
        assert source not in origin.parents, f"{module_name} was imported from the source tree: {origin}"
        names = getattr(module, "__all__", ["__version__"] if module_name == "topkd" else [])
        assert names, f"{module_name} has no __all__: nothing says what is public"
        missing = [name for name in names if not hasattr(module, name)]
        assert not missing, f"{module_name}.__all__ promises what is not there: {missing}"
        count += len(names)
    return count


def check_light(python: str) -> None:
    """The client rooms load no learning framework, not even when every name of theirs is used."""
    code = "\n".join(f"from {name} import *" for name in PUBLIC)
    code += f"\nimport sys; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", f"importing the client rooms loads {out.stdout.strip()}"


if __name__ == "__main__":
    dist_dir, source_root = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    present = [name for name in HEAVY if find_spec(name)]
    assert not present, f"the clean environment is not clean: {present}"
    check_contents(dist_dir, source_root)
    names = check_public_names(source_root)
    check_light(sys.executable)
    version = distribution("topkd").version
    assert version == importlib.import_module("topkd").__version__
    print(f"wheel: topkd {version}, {names} public names import without torch, vllm or transformers")

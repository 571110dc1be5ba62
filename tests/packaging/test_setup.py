"""scripts/setup.sh with the real pip, on a miniature project whose every package lies on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup.sh"
BASH = shutil.which("bash") or "bash"

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
# The smallest editable wheel there can be, so that no build tool has to be fetched.
BACKEND = """\
import zipfile
from pathlib import Path

META = "Metadata-Version: 2.1\\nName: topkd\\nVersion: 0.1\\n"
META += "Provides-Extra: dev\\nRequires-Dist: torch>=2.4; extra == 'dev'\\n"
META += "".join(f"Requires-Dist: {line}; extra == 'dev'\\n" for line in Path("more.txt").read_text().split())


def build_editable(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(Path(folder) / "topkd-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("topkd.pth", str(Path.cwd()) + "\\n")
        wheel.writestr("topkd-0.1.dist-info/METADATA", META)
        wheel.writestr("topkd-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("topkd-0.1.dist-info/RECORD", "")
    return "topkd-0.1-py3-none-any.whl"
"""


def _put_wheel(index: Path, name: str, release: str, requires: str = "") -> None:
    module, folder = name.replace("-", "_"), index / name
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{release}-py3-none-any.whl", "w") as wheel:
        info = f"{module}-{release}.dist-info"
        wheel.writestr(f"{module}.py", f"__version__ = {release!r}\n")
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    links = "".join(f'<a href="{wheel.name}">{wheel.name}</a>\n' for wheel in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(links, encoding="utf-8")


@dataclass
class Clone:
    """A miniature clone (with a space in its path), and the calls made in it."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def start(self, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BASH, "scripts/setup.sh", "dev"],
            cwd=self.root,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def setup(self, **env: str) -> tuple[int, str, str]:
        with self.start(**env) as process:
            out, err = process.communicate(timeout=240)
        return process.returncode, out.strip(), err

    @property
    def bin(self) -> Path:
        return self.root / ".venv" / "bin"

    def torch(self) -> str:
        code = "import topkd, torch; print(torch.__version__)"
        return subprocess.check_output([self.bin / "python", "-c", code], text=True, cwd=self.root.parent).strip()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    root = tmp_path / "a clone"
    (root / "scripts").mkdir(parents=True)
    (root / "topkd").mkdir()
    (root / "topkd" / "__init__.py").write_text("", encoding="utf-8")
    shutil.copy(SCRIPT, root / "scripts" / "setup.sh")
    (root / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (root / "backend.py").write_text(BACKEND, encoding="utf-8")
    (root / "more.txt").write_text("", encoding="utf-8")  # what the dev extra wants besides torch
    (root / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    index = tmp_path / "index"
    _put_wheel(index, "torch", "2.13.0", requires="nvidia-cublas")
    _put_wheel(index, "nvidia-cublas", "13.0")
    tools = tmp_path / "tools"  # no nvidia-smi, and one Python only
    tools.mkdir()
    (tools / "python3").symlink_to(sys.executable)
    for tool in ("cat", "cksum", "grep", "mktemp", "rm", "mkdir", "dirname", "uname", "find", "sed", "head"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    home = tmp_path / "home"
    home.mkdir()
    env = {
        "HOME": str(home),
        "PATH": str(tools),
        "TMPDIR": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": index.as_uri(),
        "PIP_NO_CACHE_DIR": "1",
        "TOPKD_TORCH_INDEX": "http://127.0.0.1:1",
    }
    return Clone(root, env)


@pytest.fixture
def cpu_index(tmp_path: Path) -> Iterator[str]:
    """A loopback index that offers torch's CPU build."""
    _put_wheel(tmp_path / "cpu", "torch", "2.13.0+cpu")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "cpu")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def _old_python(folder: Path) -> None:
    (folder / "python3").unlink()
    (folder / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2"\nexit 1\n')
    (folder / "python3").chmod(0o755)


def test_without_a_new_enough_python_it_says_which_ones_it_found(clone: Clone) -> None:
    _old_python(Path(clone.env["PATH"]))
    status, out, err = clone.setup()
    assert (status, out) == (2, "")
    assert "no Python >= 3.11 on PATH (found: python3 (Python 3.9.2))" in err
    assert not (clone.root / ".venv" / "bin").exists()


def test_a_named_python_that_is_too_old_is_refused_by_name(clone: Clone) -> None:
    _old_python(Path(clone.env["PATH"]))
    status, _, err = clone.setup(PYTHON="python3")
    assert status == 2
    assert "PYTHON=python3 does not run or is older than 3.11" in err


linux = pytest.mark.skipif(sys.platform != "linux", reason="torch brings CUDA packages on Linux only")


@pytest.mark.slow
@linux
def test_ci_refuses_a_torch_that_brings_cuda(clone: Clone) -> None:
    status, out, err = clone.setup(CI="true")
    assert (status, out) == (2, "")
    assert "torch would bring CUDA packages into CI (nvidia-cublas)" in err
    assert not list((clone.root / ".venv").rglob("torch.py"))


@linux
def test_the_cpu_build_is_taken_where_an_index_offers_it_and_a_second_call_installs_nothing(
    clone: Clone, cpu_index: str
) -> None:
    status, out, err = clone.setup(CI="true", TOPKD_TORCH_INDEX=cpu_index)
    assert (status, out) == (0, str(clone.bin)), err
    assert clone.torch() == "2.13.0+cpu"
    before = {path: path.stat().st_mtime_ns for path in (clone.root / ".venv").rglob("*")}
    assert clone.setup(CI="true") == (0, str(clone.bin), "")
    assert {path: path.stat().st_mtime_ns for path in (clone.root / ".venv").rglob("*")} == before


@pytest.mark.slow
@linux
def test_outside_ci_without_a_cpu_build_it_goes_on_and_says_so(clone: Clone) -> None:
    status, out, err = clone.setup()
    assert (status, out) == (0, str(clone.bin)), err
    assert "CUDA packages come along" in err
    assert clone.torch() == "2.13.0"


@pytest.mark.slow
def test_changed_pins_are_installed_and_a_moved_folder_is_set_up_anew(clone: Clone) -> None:
    assert clone.setup(TOPKD_ALLOW_CUDA="1")[0] == 0
    _put_wheel(Path(clone.env["PIP_INDEX_URL"].removeprefix("file://")), "torch", "2.14.0")
    (clone.root / "constraints.txt").write_text("torch==2.14.0\n", encoding="utf-8")
    status, _, err = clone.setup()
    assert (status, clone.torch()) == (0, "2.14.0"), err
    moved = Clone(clone.root.rename(clone.root.with_name("moved here")), clone.env)
    status, out, err = moved.setup(TOPKD_ALLOW_CUDA="1")
    assert (status, out) == (0, str(moved.bin)), err
    assert "making .venv anew" in err
    assert moved.torch() == "2.14.0"


@pytest.mark.slow
def test_an_active_environment_with_torch_is_used_with_its_own_torch(clone: Clone, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    subprocess.run([sys.executable, "-m", "venv", mine], check=True)
    index = Path(clone.env["PIP_INDEX_URL"].removeprefix("file://"))
    _put_wheel(index, "torch", "2.9.1+mine")
    for release in ("1.0", "1.1", "1.2"):
        for name in ("kept", "missing", "ruff"):
            _put_wheel(index, name, release)
    (clone.root / "more.txt").write_text("kept\nmissing\nruff\n", encoding="utf-8")
    (clone.root / "constraints.txt").write_text("torch==2.13.0\nkept==1.1\nmissing==1.1\nruff==1.1\n", encoding="utf-8")
    had = ["torch==2.9.1+mine", "kept==1.0", "ruff==1.0"]
    subprocess.run([mine / "bin" / "python", "-m", "pip", "install", "-qq", *had], check=True, env=clone.env)
    status, out, err = clone.setup(VIRTUAL_ENV=str(mine))
    assert (status, out) == (0, str(mine / "bin")), err
    code = "import topkd, torch, kept, missing, ruff; print([m.__version__ for m in (torch, kept, missing, ruff)])"
    said = subprocess.check_output([mine / "bin" / "python", "-c", code], text=True)
    assert said.strip() == str(["2.9.1+mine", "1.0", "1.1", "1.1"]), (
        "what it had, but for the linters; the rest as pinned"
    )
    assert not (clone.root / ".venv").exists()


@pytest.mark.slow
def test_an_active_environment_without_torch_is_left_alone(clone: Clone, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", mine], check=True)
    status, out, err = clone.setup(VIRTUAL_ENV=str(mine), TOPKD_ALLOW_CUDA="1")
    assert (status, out) == (0, str(clone.bin)), err
    assert "has no torch: using" in err
    assert not (mine / ".topkd").exists()


@pytest.mark.slow
def test_two_calls_at_once_make_one_whole_environment(clone: Clone) -> None:
    calls = [clone.start(TOPKD_ALLOW_CUDA="1") for _ in range(3)]
    said = [call.communicate(timeout=240) for call in calls]
    assert [call.returncode for call in calls] == [0, 0, 0], said
    assert sum("making .venv" in err for _, err in said) == 1
    assert sum("installing topkd" in err for _, err in said) == 1
    assert clone.torch() == "2.13.0"


@pytest.mark.slow
def test_an_interrupted_set_up_is_completed_by_the_next_call(clone: Clone) -> None:
    (clone.root / ".venv" / ".topkd").mkdir(parents=True)
    (clone.root / ".venv" / ".topkd" / "root").write_text(f"{clone.root}\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone.root / ".venv"], check=True)
    status, out, err = clone.setup(TOPKD_ALLOW_CUDA="1")
    assert (status, out) == (0, str(clone.bin)), err
    assert clone.torch() == "2.13.0"

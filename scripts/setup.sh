#!/usr/bin/env bash
# Prints the bin folder of a Python environment in which topkd (editable) and the asked extras are installed; makes or
# completes that environment first where needed. Everything said to the reader goes to stderr.
#
#   bin="$(scripts/setup.sh dev)" && "$bin/pytest"
#   scripts/setup.sh train,serve,report
#
# Which environment:
#   * an active virtual environment whose Python imports torch: that one, with its torch and whatever else it has as it is;
#   * otherwise .venv in the repository, made on first use, with the pins of constraints.txt. On Linux without an NVIDIA
#     driver torch's CPU build is taken where one can be reached, and with CI=true nothing else is accepted.
# A second call with unchanged pyproject.toml, constraints.txt and extras installs nothing.
#
# PYTHON=...              the interpreter to make .venv with (default: the first of python3, python3.13 ... that is >= 3.11)
# TOPKD_TORCH_INDEX=...   where torch's CPU build is looked for (default: PyTorch's own index)
# TOPKD_ALLOW_CUDA=1      take torch as the index gives it, CUDA packages included
set -euo pipefail
exec 3>&1 1>&2 # stdout carries the answer only

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
extras=${1:?usage: scripts/setup.sh EXTRAS, for example: scripts/setup.sh dev}
torch_index=${TOPKD_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: %s\n' "$*"
  exit 2
}
answer() {
  printf '%s\n' "$venv/bin" >&3
  exit 0
}
new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1; }
base_of() { "$1" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)' </dev/null; }
in_ci() { [ -n "${CI:-}" ] && [ "${CI:-}" != false ]; }
pip() { PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip "$@" </dev/null; }
scratch() { mktemp "${TMPDIR:-/tmp}/topkd-setup.XXXXXX"; }

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    new_enough "$PYTHON" || die "PYTHON=$PYTHON does not run or is older than 3.11: name a Python >= 3.11"
    python=$(base_of "$PYTHON")
    return
  fi
  local candidate found=""
  for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if new_enough "$candidate"; then
      python=$(base_of "$candidate")
      return
    fi
    found="$found $candidate ($("$candidate" --version 2>&1 </dev/null | head -n 1 || true))"
  done
  die "no Python >= 3.11 on PATH (found:${found:- none}): install one, or name it: PYTHON=/path/to/python3.11 make ..."
}

# The stamp of an environment says which extras were installed from which pyproject.toml, constraints.txt and clone.
key() { printf '%s %s\n' "$(cat pyproject.toml constraints.txt "${BASH_SOURCE[0]}" | cksum)" "$root"; }
stamped() { # dev holds every other extra that make asks for
  local name
  for name in dev "$extras"; do
    [ -x "$venv/bin/python" ] && [ -f "$venv/.topkd/$name" ] && [ "$(cat "$venv/.topkd/$name")" = "$(key)" ] && return 0
  done
  return 1
}
lock() { # flock(1) is not on every system; a lock taken through the inherited descriptor lasts until this shell ends
  mkdir -p "$venv/.topkd" || die "cannot write $venv"
  exec 9>>"$venv/.topkd/lock"
  "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
  say "waiting for another set-up of $venv"
  "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
}
install() {
  local quiet=-qq
  [ -t 2 ] && quiet=
  say "installing topkd[$extras] into $venv (first time: some minutes)"
  rm -f "$venv/.topkd/dev" "$venv/.topkd/$extras"
  pip install $quiet "$@" -e ".[$extras]" || die "pip could not install topkd[$extras] (its reason is above)"
  "$venv/bin/python" -c 'import topkd' || die "topkd was installed into $venv but does not import"
  key >"$venv/.topkd/$extras"
}

use_active() {
  venv=$1
  stamped && answer
  "$venv/bin/python" -c 'import torch' </dev/null >/dev/null 2>&1 || {
    say "the active environment $venv has no torch: using $root/.venv instead"
    return 0
  }
  new_enough "$venv/bin/python" || die "the active environment $venv is older than Python 3.11: deactivate it, or use a newer one"
  lock "$venv/bin/python"
  stamped && answer
  say "using the active environment $venv and its torch"
  local pins status=0
  pins=$(scratch)
  # What is there stays, within pyproject's ranges: a dependency that wants another torch is an error, not a silent
  # replacement. What is missing comes as it was tested.
  "$venv/bin/python" - >"$pins" <<'PY'
from importlib.metadata import PackageNotFoundError, version

for line in open("constraints.txt", encoding="utf-8"):
    name, _, _ = line.strip().partition("==")
    try:
        there = version(name) if name and not name.startswith("#") else ""
    except PackageNotFoundError:
        there = ""
    if name == "torch":
        print(f"torch=={there}")
    elif not there or name in {"import-linter", "mypy", "ruff"}:
        print(line, end="")
PY
  (install -c "$pins") || status=$?
  rm -f "$pins"
  [ "$status" = 0 ] || exit "$status"
  answer
}

nvidia_driver() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; }
torch_is_there() { "$venv/bin/python" -c 'from importlib.metadata import version; version("torch")' >/dev/null 2>&1; }
reachable() {
  "$python" -c 'import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method="HEAD"), timeout=5)' \
    "$1/torch/" </dev/null >/dev/null 2>&1
}
cuda_packages() { # what resolving torch alone would bring; nothing is downloaded but metadata
  local report
  report=$(scratch)
  pip install -qq --dry-run --ignore-installed --report "$report" -c constraints.txt "$@" torch >/dev/null ||
    { rm -f "$report"; die "pip could not resolve torch (its reason is above)"; }
  "$venv/bin/python" - "$report" <<'PY'
import json, re, sys
names = [item["metadata"]["name"].lower() for item in json.load(open(sys.argv[1], encoding="utf-8"))["install"]]
print(" ".join(sorted(name for name in names if re.match(r"(nvidia|cuda)-", name))))
PY
  rm -f "$report"
}
install_cpu_torch() {
  [ "$(uname -s)" = Linux ] && [ -z "${TOPKD_ALLOW_CUDA:-}" ] || return 0
  torch_is_there && return 0
  in_ci || ! nvidia_driver || return 0
  local brought where
  brought=$(cuda_packages)
  where=()
  if [ -n "$brought" ] && reachable "$torch_index"; then
    where=(--extra-index-url "$torch_index")
    brought=$(cuda_packages "${where[@]}")
  fi
  if [ -n "$brought" ]; then
    if in_ci; then
      die "torch would bring CUDA packages into CI ($brought), and $torch_index offers no CPU build or does not answer:" \
        "configure an index or find-links with a CPU build of $(grep '^torch==' constraints.txt)," \
        "or set TOPKD_ALLOW_CUDA=1"
    fi
    say "no CPU build of torch can be reached ($torch_index): its CUDA packages come along, some gigabytes"
    return 0
  fi
  say "taking the CPU build of torch"
  # torch by itself, so that no other package is looked for on the extra index.
  pip install -qq -c constraints.txt ${where[@]+"${where[@]}"} torch || die "pip could not install torch (its reason is above)"
}

make_venv() {
  venv=$root/.venv
  stamped && answer
  find_python
  lock "$python"
  stamped && answer
  local owner=""
  [ -f "$venv/.topkd/root" ] && owner=$(cat "$venv/.topkd/root")
  if [ -n "$owner" ] && { [ "$owner" != "$root" ] || ! new_enough "$venv/bin/python" || ! pip --version >/dev/null 2>&1; }; then
    [ ! -e "$venv/pyvenv.cfg" ] || say "making .venv anew: it was left half made, this folder was moved, or its Python is gone"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .topkd -exec rm -rf {} +
    find "$venv/.topkd" -type f ! -name lock -exec rm -f {} +
  fi
  if [ ! -e "$venv/bin/python" ]; then
    say "making .venv with $("$python" --version 2>&1)"
    # Written first: a half-made environment is then known to be ours, and made anew.
    printf '%s\n' "$root" >"$venv/.topkd/root"
    "$python" -m venv "$venv" || {
      rm -rf "$venv/bin"
      die "'$python -m venv' failed (its reason is above): on Debian and Ubuntu install python3-venv"
    }
  fi
  new_enough "$venv/bin/python" || die "$venv has no working Python >= 3.11: remove it and try again"
  pip --version >/dev/null 2>&1 || die "$venv has no pip: remove it and try again"
  install_cpu_torch
  install -c constraints.txt
  printf '%s\n' "$root" >"$venv/.topkd/root"
  answer
}

active=${VIRTUAL_ENV:-}
if [ -n "$active" ] && [ -x "$active/bin/python" ] && [ "$(cd "$active" && pwd -P)" != "$root/.venv" ]; then
  use_active "$active"
fi
make_venv

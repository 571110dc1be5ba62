#!/usr/bin/env bash
# Installs a second real engine into .venv-llama: the llama.cpp server (xllamacpp) and the GGUF writer (gguf), both plain
# wheels from PyPI, about 10 s and 150 MB. It samples top-K but cannot score a prompt: the suite's "cannot teach" case.
#
#   PYTHON      interpreter to build the venv with (default: the first of python3.11, 3.12, 3.13, 3.10 that is there)
#   LLAMA_VENV  where the venv goes (default: .venv-llama in the checkout)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${LLAMA_VENV:-.venv-llama}
stamp=$venv/.topkd-stamp
packages=(xllamacpp==2026.10.11549 gguf==0.19.0 safetensors numpy)
want="${packages[*]} / recipe 1"

say() { printf 'setup_llama: %s\n' "$*" >&2; }

# One installer at a time: two concurrent make calls would both write the same site-packages. The script is its own lock.
if command -v flock >/dev/null; then
  exec 9<"scripts/${0##*/}"
  flock 9
fi

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$venv/bin/python" ]; then
  say "xllamacpp is already in $venv"
  exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  say "no Python >= 3.10 found (with the venv module); set PYTHON=/path/to/python"
  exit 1
fi

started=$(date +%s)
rm -rf "$venv"
"$python" -m venv "$venv"
if ! "$venv/bin/python" -m pip --disable-pip-version-check install -qq "${packages[@]}"; then
  say "pip could not install ${packages[*]}; is PyPI (or the mirror in pip's configuration) reachable?"
  exit 1
fi
if ! "$venv/bin/python" -c 'import gguf, xllamacpp' >/dev/null; then
  say "xllamacpp is installed in $venv but does not import; the traceback is above"
  exit 1
fi
printf '%s' "$want" >"$stamp"
say "$("$venv/bin/python" -m pip --disable-pip-version-check list 2>/dev/null | awk '/^xllamacpp /{print $1" "$2}') ready in $venv after $(($(date +%s) - started)) s"

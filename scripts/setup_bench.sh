#!/usr/bin/env bash
# Installs the clients that topkd's figures F2 and F4 are measured against (openai-python and TRL) into .venv-bench; a
# second call is a no-op. Their own venv, because what they float on is not what topkd is tested with.
#
#   PYTHON         interpreter to build the venv with (default: the first of python3.11 ... 3.13 that is there)
#   BENCH_VENV     where the venv goes (default: .venv-bench in the checkout)
#   TOPKD_REBUILD  set to 1 to throw an existing venv away
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${BENCH_VENV:-.venv-bench}
stamp=$venv/.topkd-stamp
packages=(openai==3.52.0 trl==1.16.0 requests numpy)
want="${packages[*]} / recipe 1"

say() { printf 'setup_bench: %s\n' "$*" >&2; }

# One installer at a time: two concurrent make calls would both write the same site-packages. The script is its own lock.
if command -v flock >/dev/null; then
  exec 9<"scripts/${0##*/}"
  flock 9
fi

if [ "${TOPKD_REBUILD:-0}" != 1 ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$venv/bin/python" ]; then
  say "${packages[0]} and ${packages[1]} are already in $venv"
  exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  say "no Python >= 3.11 found (with the venv module); set PYTHON=/path/to/python"
  exit 1
fi

started=$(date +%s)
say "building $venv with $("$python" --version 2>&1)"
rm -rf "$venv"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# TRL imports torch. PyPI's build for Linux is CUDA's; pip's own configuration may hold a CPU build, and PyTorch's CPU
# index is the other source, asked only when it answers.
extra=()
index=https://download.pytorch.org/whl/cpu
if [ "$(uname -s)" = Linux ] && "$venv/bin/python" - "$index/torch/" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=5).close()
except Exception:
    sys.exit(1)
PY
then
  extra=(--extra-index-url "$index")
fi
pins=$(mktemp "${TMPDIR:-/tmp}/topkd-bench.XXXXXX")
trap 'rm -f "$pins"' EXIT
grep '^torch==' constraints.txt >"$pins"
if ! "${pip[@]}" install -qq ${extra[@]+"${extra[@]}"} -c "$pins" torch || ! "${pip[@]}" install -qq -c "$pins" "${packages[@]}"; then
  say "pip could not install ${packages[*]}; is PyPI (or the mirror in pip's configuration) reachable?"
  exit 1
fi
if ! "$venv/bin/python" -c 'import openai, trl.generation.vllm_client' >/dev/null; then
  say "the packages are installed in $venv but do not import; the traceback is above"
  exit 1
fi
printf '%s' "$want" >"$stamp"
say "${packages[0]} and ${packages[1]} ready in $venv after $(($(date +%s) - started)) s"

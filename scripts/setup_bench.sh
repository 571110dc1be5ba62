#!/usr/bin/env bash
# Installs the clients that topkd's figures F2 and F4 are measured against (openai-python and TRL) into .venv-bench; a
# second call is a no-op. Their own venv, because what they float on is not what topkd is tested with.
#
#   PYTHON         interpreter to build the venv with (default: the first of python3.11 ... 3.13 that is there)
#   BENCH_VENV     where the venv goes (default: .venv-bench in the checkout)
#   TOPKD_REBUILD  set to 1 to throw an existing venv away
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/own_venv.sh

venv=${BENCH_VENV:-.venv-bench}
packages=(openai==3.52.0 trl==1.16.0 requests numpy)
want="${packages[*]} / recipe 1"

one_installer
if is_there; then
  say "${packages[0]} and ${packages[1]} are already in $venv"
  exit 0
fi

new_venv 3.11 3.13
find_cpu_torch  # TRL imports torch
pins=$(mktemp "${TMPDIR:-/tmp}/topkd-bench.XXXXXX")
trap 'rm -f "$pins"' EXIT
grep '^torch==' constraints.txt >"$pins"
"${pip[@]}" install -qq ${extra[@]+"${extra[@]}"} -c "$pins" torch || not_installed torch
"${pip[@]}" install -qq -c "$pins" "${packages[@]}" || not_installed "${packages[*]}"
"$venv/bin/python" -c 'import openai, trl.generation.vllm_client' >/dev/null || not_working "${packages[*]}"
ready "${packages[0]} and ${packages[1]}"

#!/usr/bin/env bash
# Installs the clients that tests/clients_of_serve points at `topkd serve` (openai-python, litellm, lm-eval, inspect-ai, TRL)
# into .venv-clients; a second call is a no-op. Their own venv, because what they float on is not what topkd is tested with.
#
#   PYTHON         interpreter to build the venv with (default: the first of python3.11 ... 3.13 that is there)
#   CLIENTS_VENV   where the venv goes (default: .venv-clients in the checkout)
#   TOPKD_REBUILD  set to 1 to throw an existing venv away
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/own_venv.sh

venv=${CLIENTS_VENV:-.venv-clients}
packages=(openai==3.57.0 litellm==1.110.2 "lm-eval[api,hf]==0.4.13" inspect-ai==0.3.285 trl==1.16.0)
want="${packages[*]} / recipe 1"

one_installer
if is_there; then
  say "the clients are already in $venv"
  exit 0
fi

new_venv 3.11 3.13
find_cpu_torch  # lm-eval's hf back end and TRL import torch
pins=$(mktemp "${TMPDIR:-/tmp}/topkd-clients.XXXXXX")
trap 'rm -f "$pins"' EXIT
grep '^torch==' constraints.txt >"$pins"
"${pip[@]}" install -qq ${extra[@]+"${extra[@]}"} -c "$pins" torch || not_installed torch
"${pip[@]}" install -qq -c "$pins" "${packages[@]}" || not_installed "${packages[*]}"
LITELLM_LOCAL_MODEL_COST_MAP=True "$venv/bin/python" -c 'import openai, litellm, lm_eval, inspect_ai, trl' >/dev/null || not_working "${packages[*]}"
ready "the clients"

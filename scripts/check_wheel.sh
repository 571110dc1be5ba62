#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel with the core dependencies only into a clean environment, and checks it
# there, away from the source.   usage: scripts/check_wheel.sh PYTHON
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${1:?usage: scripts/check_wheel.sh PYTHON}
case $python in /*) ;; *) python=$PWD/$python ;; esac
away=$(mktemp -d "${TMPDIR:-/tmp}/topkd-wheel.XXXXXX")
trap 'rm -rf "$away"' EXIT

cp "$root/scripts/check_wheel.py" "$away/"
# The wheel is built from the sdist: what the sdist lacks, the wheel lacks, and the check below says so.
"$python" -m build --outdir "$away/dist" "$root" >"$away/build.log" 2>&1 || { cat "$away/build.log" >&2; exit 1; }
cd "$away"
"$python" -m venv env
PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 env/bin/python -m pip install -qq dist/*.whl
mkdir elsewhere home
cd elsewhere
env -u PYTHONPATH -u VIRTUAL_ENV HOME="$away/home" ../env/bin/python -I ../check_wheel.py ../dist "$root"
env -u PYTHONPATH -u VIRTUAL_ENV HOME="$away/home" ../env/bin/topkd --help >help.txt
grep -qi usage help.txt || { echo "topkd --help printed no usage line" >&2; cat help.txt >&2; exit 1; }
printf 'wheel: %s installs with core dependencies only, imports, and topkd --help answers\n' "$(basename ../dist/*.whl)"

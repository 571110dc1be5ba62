# Sourced by the setup scripts that build an environment of their own. The caller sets `venv` (its folder) and `want` (what
# has to be in it, in words: another text builds it anew), and is in the checkout's root.
# shellcheck shell=bash disable=SC2154

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }

# One installer at a time: two concurrent make calls would both write the same site-packages. The script is its own lock.
one_installer() {
  if command -v flock >/dev/null; then
    exec 9<"scripts/${0##*/}"
    flock 9
  fi
}

# Whether what is wanted is there; TOPKD_REBUILD=1 throws an existing environment away.
is_there() {
  [ "${TOPKD_REBUILD:-0}" != 1 ] && [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.topkd-stamp" 2>/dev/null)" = "$want" ]
}

# new_venv 3.11 3.14: an empty environment of $PYTHON, or of the first Python of that range; sets `pip`.
new_venv() {
  local python=${PYTHON:-} candidate
  local fits="import sys, venv; sys.exit(not (${1/./, }) <= sys.version_info[:2] <= (${2/./, }))"
  if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3.14 python3.10 python3; do
      if command -v "$candidate" >/dev/null && "$candidate" -c "$fits" 2>/dev/null; then
        python=$candidate
        break
      fi
    done
  fi
  if [ -z "$python" ]; then
    say "no Python from $1 to $2 found (with the venv module); set PYTHON=/path/to/python"
    exit 1
  fi
  say "building $venv with $("$python" --version 2>&1)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  pip=("$venv/bin/python" -m pip --disable-pip-version-check)
}

# PyPI's torch for Linux is the CUDA build (several GB, useless here). pip's own configuration (find-links, a mirror) may
# hold a CPU build; PyTorch's CPU index is the other source, asked only when it answers. Sets `extra`, pip's options.
find_cpu_torch() {
  local index=https://download.pytorch.org/whl/cpu
  local asks='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5).close()'
  extra=()
  if [ "$(uname -s)" = Linux ] && "$venv/bin/python" -c "$asks" "$index/torch/" 2>/dev/null; then
    extra=(--extra-index-url "$index")
  fi
}

# not_installed WHAT, not_working WHAT: the two ways to fail, said alike.
not_installed() {
  say "pip could not install $1; is PyPI (or the mirror in pip's configuration) reachable?"
  exit 1
}
not_working() {
  say "$1 is installed in $venv but does not import; the traceback is above"
  exit 1
}

# ready WHAT: stamps the environment, so that a second call is a no-op.
ready() {
  printf '%s' "$want" >"$venv/.topkd-stamp"
  say "$1 ready in $venv after $SECONDS s"
}

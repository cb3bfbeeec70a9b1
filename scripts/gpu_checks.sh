#!/usr/bin/env bash
# Checks an NVIDIA GPU with what is installed beside it, in 10 minutes: an RTX card with TensorRT for RTX, a Jetson or a server with TensorRT,
# or a server with PyTorch alone. `python -m scripts.gpu_checks --help` explains parts, options and results.
#
#   scripts/gpu_checks.sh OUTPUT [OPTIONS]
#
# PYTHON names the interpreter; without it, .venv/bin/python is taken if it exists, else python3. Wheels in the folder WHEELS (.whl by default)
# are installed into a temporary folder first, for machines without a network.
set -eu
output=${1:?usage: scripts/gpu_checks.sh OUTPUT [OPTIONS]}
shift
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "${WHEELS:-.whl}/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" "${WHEELS:-.whl}"/*.whl
    export PYTHONPATH="$scratch/site:$PYTHONPATH"
fi
# Triton compiles here, and caches what it compiled for all parts.
export TRITON_INTERPRET=0 TRITON_CACHE_DIR="$scratch/triton" PYTHONUNBUFFERED=1
"$python" -m scripts.gpu_checks "$output" "$@"

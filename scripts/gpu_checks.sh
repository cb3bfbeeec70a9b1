#!/usr/bin/env bash
# Runs everything that needs an NVIDIA GPU: tests, the kernels' benchmark, sanitizers, and an engine of TensorRT for RTX.
#
#   scripts/gpu_checks.sh OUTPUT [WHEELS]
#
# Logs, kernels.json and engine.json go into the folder OUTPUT; wheels in the folder WHEELS (.whl by default) are installed into a
# temporary folder first, for machines without a network. PYTHON names the interpreter (python3 by default); LIMIT is the time limit
# of each part in seconds (300); PARTS names the parts to run, as in PARTS="kernels bench" (all by default). If a part fails, the others
# run nevertheless; the exit status is the number of parts that failed.
set -u
output=${1:?usage: scripts/gpu_checks.sh OUTPUT [WHEELS]}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$output" || exit 1
output=$(cd "$output" && pwd)
wheels=${2:-.whl}
python=${PYTHON:-python3}
limit=${LIMIT:-300}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Triton compiles here, and caches what it compiled for all parts.
export TRITON_INTERPRET=0 TRITON_CACHE_DIR="$scratch/triton" PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0

part() { # part NAME COMMAND...: run the command within the limit; write its output to NAME.log, and print the end of it
    local name=$1 begun=$SECONDS status
    shift
    [[ $name == wheels || " ${PARTS-$name} " == *" $name "* ]] || return 0
    timeout "$limit" "$@" >"$output/$name.log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    echo "== $name: exit status $status, $((SECONDS - begun)) s"
    tail -n 12 "$output/$name.log"
}

if compgen -G "$wheels/*.whl" >/dev/null; then
    part wheels "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" "$wheels"/*.whl
    export PYTHONPATH="$scratch/site:$PYTHONPATH"
fi

part doctor "$python" -m cli.main doctor --json "$output/doctor.json"
part kernels "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu/test_kernels.py tests/trt_plugins
part bench "$python" -m benchmarks.kernels --json "$output/kernels.json"
# Not all GPUs that TensorRT for RTX supports are documented: this tries the one at hand.
# It is a file because the processes that compile kernels import it again.
cat >"$scratch/try_engine.py" <<'PYTHON'
import sys

import numpy as np

from cli.demo import carried_checkpoint
from export.engine import build_engine
from export.export import export_bundle
from runtime.bundle import Bundle
from runtime.doctor import find_gpus
from runtime.files import write_json
from runtime.targets.registry import open_engine


if __name__ == "__main__":
    folder, report = sys.argv[1:]
    export_bundle(carried_checkpoint(), folder)
    gpus, attempts = find_gpus(), {}
    for precision in ("fp32", "fp16"):
        try:
            build_engine(folder, "tensorrt-rtx", precision)
            bundle = Bundle.open(folder)
            with open_engine(bundle, "tensorrt-rtx") as engine:
                image = np.random.default_rng(0).normal(size=(1, 3, *bundle.manifest.canvas)).astype(np.float32)
                times = [engine.run(image, grid_override=3).times_ms for _ in range(20)][-1]
            attempts[precision] = {"runs": True, "times_ms": dict(times)}
        except Exception as error:
            attempts[precision] = {"runs": False, "error": f"{type(error).__name__}: {error}"}
        print(gpus, precision, attempts[precision])
        # Written after each attempt: a library may end the process.
        write_json(report, {"gpus": gpus, "attempts": attempts})
    sys.exit(not all(attempt["runs"] for attempt in attempts.values()))
PYTHON
part engine "$python" "$scratch/try_engine.py" "$scratch/bundle" "$output/engine.json"
part engines "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu/test_engines.py
# The kernels are compiled by now, so that a sanitizer sees only their runs. Small cases: it makes them tens of times slower.
for tool in memcheck racecheck; do
    # PyTorch's memory pool would hide accesses beyond the end of a tensor.
    part "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 86 \
        "$python" -m pytest -q -x -p no:cacheprovider -m gpu tests/gpu/test_kernels.py \
        -k "(lite0 or version or proposals or detections) and not same_bits"
done
echo "$failed parts failed; logs are in $output"
exit "$failed"

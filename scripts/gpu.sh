#!/usr/bin/env bash
# What a GPU shows, in one command of under ten minutes: the tests of all kernels on the device, small runs beside a CPU's, each
# kernel against its roofline, and one optimizer step of the zeta recipe's shape with random weights.
#
#   scripts/gpu.sh                        builds first, unless `scripts/gpu.sh build` has been run here or elsewhere
#   scripts/gpu.sh build                  only builds, into target/gpu: no GPU is needed for it, and the folder is all that `run` needs
#   scripts/gpu.sh run [layers] [rows] [chunk tokens] [dtype]
set -euo pipefail
cd "$(dirname "$0")/.."
place=target/gpu

build() {
    mkdir -p "$place"
    local list=$place/built.json
    # `--lib`, as tests: those of the crate `kernels` are wanted. Optimised: times are taken of all that runs.
    local built=(--release --locked --workspace --features kernels/cuda,trainer/cuda --message-format json)
    scripts/cuda.sh cargo test "${built[@]}" --lib --bench gpu --bench zeta --no-run > "$list"
    scripts/cuda.sh cargo build "${built[@]}" --bin trainer >> "$list"
    python3 - "$list" "$place" <<'PYTHON'
import json, shutil, sys

wanted = {("gpu", "bench"): "kernel-bench", ("zeta", "bench"): "zeta"}
wanted |= {("kernels", "lib"): "kernel-tests", ("trainer", "bin"): "trainer"}
for line in open(sys.argv[1]):
    found = json.loads(line)
    if found.get("executable"):
        name = wanted.get((found["target"]["name"], found["target"]["kind"][0]))
        if name:
            shutil.copy(found["executable"], f"{sys.argv[2]}/{name}")
PYTHON
    rm "$list"
    strip "$place"/kernel-bench "$place"/zeta "$place"/kernel-tests "$place"/trainer
    cc -shared -fPIC -O1 -o "$place/libcount.so" kernels/benches/count.c -ldl
    # Packed they take a quarter: what is carried to a GPU should be small.
    gzip --force "$place"/kernel-bench "$place"/zeta "$place"/kernel-tests "$place"/trainer
    ls -l "$place"
}

run() {
    # CUDA's libraries: where a toolkit has them, or Python's packages.
    local packages
    packages=$(python3 -c 'import glob, sys; print(*(f for p in sys.path for f in glob.glob(f"{p}/nvidia/*/lib")), sep=":")' 2>/dev/null || true)
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64${packages:+:$packages}
    command -v nvidia-smi >/dev/null || { echo "gpu.sh: no nvidia-smi, so no GPU" >&2; exit 1; }
    gunzip --force --keep "$place"/*.gz
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    echo "== the kernels' tests, on the device"
    LODESTONE_GPU=1 "$place/kernel-tests" --test-threads 4 gpu:: --skip emulated
    echo "== small runs: a CPU's losses, resumed, two ranks"
    LODESTONE_GPU=1 scripts/gpu_runs.py "$place/trainer"
    echo "== the kernels, against their rooflines"
    "$place/kernel-bench"
    echo "== one step of the zeta recipe"
    # One wait is the step's, which reads its losses; one is the benchmark's, which takes the time.
    LODESTONE_WAITS=2 LD_PRELOAD="$PWD/$place/libcount.so" LODESTONE_DEVICE=cuda "$place/zeta" "$@"
}

case "${1:-all}" in
    build) build ;;
    run) shift; run "$@" ;;
    all)
        [ -e "$place/zeta.gz" ] || build
        run
        ;;
    *) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac

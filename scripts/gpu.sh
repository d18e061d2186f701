#!/usr/bin/env bash
# What a GPU shows, in one command of under ten minutes: the tests of all kernels on the device, each kernel against its
# roofline, and one optimizer step of the zeta recipe's shape with random weights.
#
#   scripts/gpu.sh                        builds first, unless `scripts/gpu.sh build` has been run here or elsewhere
#   scripts/gpu.sh build                  only builds, into target/gpu: no GPU is needed for it
#   scripts/gpu.sh run [layers] [rows] [chunk tokens] [dtype]
set -euo pipefail
cd "$(dirname "$0")/.."
place=target/gpu

build() {
    local list=target/gpu/built.json
    mkdir -p "$place"
    scripts/cuda.sh cargo build --locked --workspace --features kernels/cuda,trainer/cuda \
        --lib --benches --target-dir target/cuda-build --message-format json > "$list"
    scripts/cuda.sh cargo test --locked --workspace --features kernels/cuda,trainer/cuda \
        --lib --no-run --target-dir target/cuda-build --message-format json >> "$list"
    python3 - "$list" "$place" <<'PYTHON'
import json, shutil, sys

wanted = {("gpu", "bench"): "kernel-bench", ("zeta", "bench"): "zeta", ("kernels", "lib"): "kernel-tests"}
for line in open(sys.argv[1]):
    found = json.loads(line)
    if found.get("executable"):
        name = wanted.get((found["target"]["name"], found["target"]["kind"][0]))
        if name:
            shutil.copy(found["executable"], f"{sys.argv[2]}/{name}")
PYTHON
    cc -shared -fPIC -O1 -o "$place/libcount.so" kernels/benches/count.c -ldl
    ls -l "$place"
}

run() {
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    echo "== the kernels' tests, on the device"
    LODESTONE_GPU=1 "$place/kernel-tests" --test-threads 4 gpu:: --skip emulated
    echo "== the kernels, against their rooflines"
    "$place/kernel-bench"
    echo "== one step of the zeta recipe"
    LD_PRELOAD="$PWD/$place/libcount.so" LODESTONE_DEVICE=cuda "$place/zeta" "$@"
}

case "${1:-all}" in
    build) build ;;
    run) shift; run "$@" ;;
    all)
        [ -x "$place/zeta" ] || build
        run
        ;;
    *) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac

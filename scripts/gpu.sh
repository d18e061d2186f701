#!/usr/bin/env bash
# Checks a GPU in less than ten minutes: tests of all kernels on the device, one optimizer step in the shape of the zeta recipe
# with random weights, small runs compared with a CPU, and each kernel compared with its roofline. All four stages run even if
# one fails; the exit status is then 1.
#
#   scripts/gpu.sh                        builds if target/gpu does not exist, then runs
#   scripts/gpu.sh build                  only builds, into target/gpu; needs no GPU
#   scripts/gpu.sh run [layers] [rows] [chunk tokens] [dtype]
#
# target/gpu can be copied to a machine with a GPU, at any place: `gpu/gpu.sh run`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ -e "$here/zeta.gz" ]; then
    place=$here
else
    cd "$here/.."
    place=$PWD/target/gpu
fi

build() {
    [ "$place" != "$here" ] || { echo "gpu.sh: can build only in the repository" >&2; exit 2; }
    mkdir -p "$place"
    local list=$place/built.json
    # `--lib` builds the unit tests; those of `kernels` are used. All is optimised because it is timed.
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
    # Compressed to a quarter, for copying.
    gzip --force "$place"/kernel-bench "$place"/zeta "$place"/kernel-tests "$place"/trainer
    rm -rf "$place/golden"
    mkdir "$place/golden"
    # Without files that the small runs do not read.
    tar -C tests/golden --exclude='golden.*' --exclude='train.*' --exclude=adapter -c mistral bert | tar -C "$place/golden" -x
    cp scripts/gpu.sh scripts/gpu_runs.py "$place"
    du -ah "$place"
}

failed=()

# Runs a command with a time limit in seconds; failures are listed at the end.
stage() {
    local limit=$1 name=$2 start=$SECONDS status=0
    shift 2
    printf '\n== %s\n' "$name"
    timeout --kill-after 10 "$limit" "$@" || status=$?
    echo "-- $((SECONDS - start)) s, exit status $status"
    [ "$status" = 0 ] || failed+=("$name")
}

run() {
    # Libraries of CUDA from a toolkit or from Python packages.
    local packages
    packages=$(python3 -c 'import glob, sys; print(*(f for p in sys.path for f in glob.glob(f"{p}/nvidia/*/lib")), sep=":")' 2>/dev/null || true)
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64${packages:+:$packages}
    command -v nvidia-smi >/dev/null || { echo "gpu.sh: nvidia-smi is missing, so there is no GPU" >&2; exit 1; }
    gunzip --force --keep "$place"/*.gz
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    stage 300 "tests of the kernels on the device" \
        env LODESTONE_GPU=1 "$place/kernel-tests" --test-threads 4 gpu:: --skip emulated
    # The step waits once, to read its losses; the benchmark waits once, to take the time.
    stage 600 "one step of the zeta recipe" \
        env LODESTONE_WAITS=2 LD_PRELOAD="$place/libcount.so" LODESTONE_DEVICE=cuda "$place/zeta" "$@"
    stage 300 "small runs: losses of a CPU, resume, two ranks" \
        env LODESTONE_GPU=1 python3 "$place/gpu_runs.py" "$place/trainer"
    stage 300 "kernels compared with their rooflines" "$place/kernel-bench"
    [ ${#failed[@]} = 0 ] || {
        printf '\n'
        printf 'failed: %s\n' "${failed[@]}" >&2
        exit 1
    }
}

case "${1:-all}" in
    build) build ;;
    run) shift; run "$@" ;;
    all)
        [ -e "$place/zeta.gz" ] || build
        run
        ;;
    *) sed -n '2,10p' "$0" >&2; exit 2 ;;
esac

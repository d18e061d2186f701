#!/usr/bin/env bash
# What a GPU shows, in one command of under ten minutes: the tests of all kernels on the device, one optimizer step of the zeta
# recipe's shape with random weights, small runs beside a CPU's, and each kernel against its roofline. All four run, whatever
# fails; then the exit status is 1.
#
#   scripts/gpu.sh                        builds first, unless `scripts/gpu.sh build` has been run here or elsewhere
#   scripts/gpu.sh build                  only builds, into target/gpu: no GPU is needed for it
#   scripts/gpu.sh run [layers] [rows] [chunk tokens] [dtype]
#
# target/gpu is all that a machine with a GPU needs, wherever it is put: `gpu/gpu.sh run`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ -e "$here/zeta.gz" ]; then
    place=$here
else
    cd "$here/.."
    place=$PWD/target/gpu
fi

build() {
    [ "$place" != "$here" ] || { echo "gpu.sh: builds in the repository alone" >&2; exit 2; }
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
    rm -rf "$place/golden"
    mkdir "$place/golden"
    # Without what the small runs do not read.
    tar -C tests/golden --exclude='golden.*' --exclude='train.*' --exclude=adapter -c mistral bert | tar -C "$place/golden" -x
    cp scripts/gpu.sh scripts/gpu_runs.py "$place"
    du -ah "$place"
}

failed=()

# Runs a command for so many seconds at most; what fails is told at the end.
stage() {
    local limit=$1 name=$2 start=$SECONDS status=0
    shift 2
    printf '\n== %s\n' "$name"
    timeout --kill-after 10 "$limit" "$@" || status=$?
    echo "-- $((SECONDS - start)) s, exit status $status"
    [ "$status" = 0 ] || failed+=("$name")
}

run() {
    # CUDA's libraries: where a toolkit has them, or Python's packages.
    local packages
    packages=$(python3 -c 'import glob, sys; print(*(f for p in sys.path for f in glob.glob(f"{p}/nvidia/*/lib")), sep=":")' 2>/dev/null || true)
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64${packages:+:$packages}
    command -v nvidia-smi >/dev/null || { echo "gpu.sh: no nvidia-smi, so no GPU" >&2; exit 1; }
    gunzip --force --keep "$place"/*.gz
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    stage 300 "the kernels' tests, on the device" \
        env LODESTONE_GPU=1 "$place/kernel-tests" --test-threads 4 gpu:: --skip emulated
    # One wait is the step's, which reads its losses; one is the benchmark's, which takes the time.
    stage 600 "one step of the zeta recipe" \
        env LODESTONE_WAITS=2 LD_PRELOAD="$place/libcount.so" LODESTONE_DEVICE=cuda "$place/zeta" "$@"
    stage 300 "small runs: a CPU's losses, resumed, two ranks" \
        env LODESTONE_GPU=1 python3 "$place/gpu_runs.py" "$place/trainer"
    stage 300 "the kernels, against their rooflines" "$place/kernel-bench"
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

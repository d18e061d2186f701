#!/usr/bin/env bash
# Builds the trainer, writes the quickstart's data, trains a small model from nothing and says what it gained.
#
#   scripts/quickstart.sh [KEY=VALUE …]      values that override those of configs/quickstart.yaml
#
# On two cores the first build takes six to ten minutes, the training one to two. Nothing but crates is downloaded.
# PROFILE=dev builds as the tests do.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
built=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}

packages=(-p trainer -p launcher)
# With the features of the tests, which would else compile the tensors anew.
[ "$profile" != dev ] || packages=(--workspace)
cargo build --locked --profile "$profile" "${packages[@]}" --example quickstart --bin trainer --bin launch
"$built/examples/quickstart" --output data/quickstart
"$built/launch" configs/quickstart.yaml "$@"

#!/usr/bin/env bash
# Builds the trainer, writes the quickstart's data, trains a small model from nothing and says what it gained.
#
#   scripts/quickstart.sh [KEY=VALUE …]      values that override those of configs/quickstart.yaml
#
# The first build takes some minutes, the training about 90 seconds on two cores. Nothing but crates is downloaded.
# PROFILE=dev builds as the tests do.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
built=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}
output=runs/quickstart
for override in "$@"; do
    case $override in output=*) output=${override#output=} ;; esac
done

cargo build --locked --profile "$profile" -p trainer -p launcher --example quickstart --bin launch
"$built/examples/quickstart" --output data/quickstart
"$built/launch" configs/quickstart.yaml "$@"

# The lines with evaluations: the first is before the training, the last after it.
scores=$(grep -o '"quickstart_cosine_ndcg@10": *[0-9.e-]*' "$output/metrics.jsonl" | sed 's/.*: *//')
awk -v before="$(head -n 1 <<<"$scores")" -v after="$(tail -n 1 <<<"$scores")" -v model="$output/model" 'BEGIN {
    printf "nDCG@10 before %.3f, after %.3f, gained %.3f; the model is in %s\n", before, after, after - before, model
}'

#!/usr/bin/env bash
# Hard negatives for the sets of configs/zeta.yaml that have none of their own: data/zeta/pairs/NAME.jsonl, or the BEIR folder
# data/zeta/pairs/NAME, becomes data/zeta/NAME.jsonl. All positives are searched, and data/zeta/corpus/NAME.jsonl where it is there.
#
#   scripts/zeta/mine.sh [NAME …]            default: all that are not there yet
#
# TopK-PercPos: of the texts most like a query those are taken that score below 95 % of its positive, since what scores higher is
# often another answer. MODEL=… mines with another model, LAUNCH='launch --gpus 4' on so many ranks (default: target/release/launch), DATA=FOLDER elsewhere;
# MINE='--negatives 5 --relative-margin 0.05' is what a negative must be.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
data=${DATA:-$root/data/zeta}
model=${MODEL:-Snowflake/snowflake-arctic-embed-m-v1.5}
launch=("$root/target/release/launch")
[ -z "${LAUNCH:-}" ] || read -ra launch <<<"$LAUNCH"
read -ra options <<<"${MINE:---negatives 5 --relative-margin 0.05}"

mine() {
    local pairs=$data/pairs/$1 corpus=()
    [ -d "$pairs" ] || pairs=$pairs.jsonl
    [ -f "$data/corpus/$1.jsonl" ] && corpus=(--corpus "$data/corpus/$1.jsonl")
    echo "$1" >&2
    "${launch[@]}" -- mine --model "$model" --pairs "$pairs" "${corpus[@]}" --output "$data/$1.jsonl" \
        "${options[@]}"
}

if [ $# -gt 0 ]; then
    for name in "$@"; do mine "$name"; done
else
    shopt -s nullglob
    pairs=("$data"/pairs/*.jsonl "$data"/pairs/*/)
    if [ ${#pairs[@]} -eq 0 ]; then
        echo "mine.sh: nothing in $data/pairs; run scripts/zeta/prepare.sh first" >&2
        exit 2
    fi
    for path in "${pairs[@]}"; do
        name=$(basename "$path" .jsonl)
        [ -f "$data/$name.jsonl" ] || mine "$name"
    done
fi

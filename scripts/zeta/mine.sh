#!/usr/bin/env bash
# Hard negatives for the sets of configs/zeta.yaml that have none of their own: data/zeta/pairs/NAME.jsonl and the texts of
# data/zeta/corpus/NAME.jsonl become data/zeta/NAME.jsonl.
#
#   scripts/zeta/mine.sh [NAME …]            default: all that are not there yet
#
# TopK-PercPos: of the texts most like a query those are taken that score below 95 % of its positive, since what scores higher is
# often another answer. MODEL=… mines with another model, LAUNCH='launch --gpus 4' on so many ranks, DATA=FOLDER elsewhere.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
data=${DATA:-$root/data/zeta}
model=${MODEL:-Snowflake/snowflake-arctic-embed-m-v1.5}
read -ra launch <<<"${LAUNCH:-launch}"

mine() {
    "${launch[@]}" -- mine --model "$model" --pairs "$data/pairs/$1.jsonl" --corpus "$data/corpus/$1.jsonl" \
        --output "$data/$1.jsonl" --negatives 5 --relative-margin 0.05
}

if [ $# -gt 0 ]; then
    for name in "$@"; do mine "$name"; done
else
    shopt -s nullglob
    pairs=("$data"/pairs/*.jsonl)
    if [ ${#pairs[@]} -eq 0 ]; then
        echo "mine.sh: $data/pairs is empty; run scripts/zeta/prepare.sh first" >&2
        exit 2
    fi
    for file in "${pairs[@]}"; do
        name=$(basename "$file" .jsonl)
        [ -f "$data/$name.jsonl" ] || mine "$name"
    done
fi

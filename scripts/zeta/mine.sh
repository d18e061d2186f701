#!/usr/bin/env bash
# Mines hard negatives for the data sets of configs/zeta.yaml that have none: reads data/zeta/pairs/NAME.jsonl, or the BEIR folder
# data/zeta/pairs/NAME, and writes data/zeta/NAME.jsonl. Searches all positives, and data/zeta/corpus/NAME.jsonl if it exists.
#
#   scripts/zeta/mine.sh [NAME …]            default: all data sets that do not exist yet
#
# The filter is TopK-PercPos: negatives must score below 95 % of the positive, since texts above it are often answers too.
#
#   MODEL=…                          model to mine with; default: Snowflake/snowflake-arctic-embed-m-v1.5
#   LAUNCH='launch --gpus 4'         command that starts the ranks; default: target/release/launch
#   DATA=FOLDER                      default: data/zeta
#   MINE='--negatives 5 --relative-margin 0.05'    options of `trainer mine`
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
        echo "mine.sh: $data/pairs is empty; run scripts/zeta/prepare.sh first" >&2
        exit 2
    fi
    for path in "${pairs[@]}"; do
        name=$(basename "$path" .jsonl)
        [ -f "$data/$name.jsonl" ] || mine "$name"
    done
fi

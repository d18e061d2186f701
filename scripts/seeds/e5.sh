#!/usr/bin/env bash
# configs/e5-base.yaml at small scale: splits XQuAD and COVID-QA in English and German, trains a small model, and compares it with
# its base on the test part. Variables: scripts/seeds/common.sh.
#
#   DATA=FOLDER scripts/seeds/e5.sh [KEY=VALUE …]
source "$(dirname "$0")/common.sh"

prepared e5
[ -d "$output/qa" ] || step "$bin/trainer" split --input "$output/qa.csv" --output "$output/qa"
step "$bin/launch" --resume "$root/configs/e5-base.yaml" model.path="$model" output="$output/run" \
    data.train.0.path="$output/qa/train.csv" evaluation.sets.0.path="$output/qa/validation.csv" evaluation.every=50 \
    model.max_query_length=64 model.max_document_length=128 training.epochs=1 data.train.0.samples=1500 "$@"
step "$bin/trainer" compare --base "$model" --tuned "$output/run/model" --set "$output/qa/test.csv" \
    --query-prompt 'query: ' --document-prompt 'passage: ' --max-length 128 --output "$output"

#!/usr/bin/env bash
# configs/mpnet-nli.yaml at small scale: trains a small model on triplets of SNLI, once with the in-batch loss and once with the
# triplet loss, and compares triplet accuracies with the base. Variables: scripts/seeds/common.sh.
#
#   DATA=FOLDER scripts/seeds/nli.sh [KEY=VALUE …]
source "$(dirname "$0")/common.sh"

prepared nli
[ -d "$output/nli" ] || step "$bin/trainer" split --input "$output/all.jsonl" --output "$output/nli"

train() {
    step "$bin/launch" --resume "$root/configs/mpnet-nli.yaml" model.path="$model" output="$output/$1" name="$1" \
        data.train.0.path="$output/nli/train.jsonl" data.train.0.samples=3000 evaluation.sets.0.path="$output/nli/validation.jsonl" \
        evaluation.every=100 training.epochs=1 "${@:2}"
    step "$bin/trainer" compare --base "$model" --tuned "$output/$1/model" --kind triplet --set "$output/nli/test.jsonl" \
        --output "$output/$1"
}

train in-batch training.batch_size=32 "$@"
train triplet training.batch_size=32 loss.kind=triplet model.normalize=false "$@"

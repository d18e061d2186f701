#!/usr/bin/env bash
# Compares with sentence-transformers on the mixture of ten data sets (ten.py): mines negatives, trains all-MiniLM-L6-v2 with both
# on the same rows and settings, and prints nDCG@10 of five retrieval sets for the base and both trained models.
#
#   DATA=FOLDER PEER=PATH/st_train.py PYTHON=… scripts/reference/ten.sh
#
# MODEL, OUTPUT and BIN as for scripts/seeds. PYTHON needs sentence-transformers. Existing files are not made again.
source "$(dirname "$0")/../seeds/common.sh"
peer=${PEER:?must name st_train.py}
here=$(cd "$(dirname "$0")" && pwd)
length=96 rate=5.0e-5 temperature=0.05

if ! [ -f "$output/train.jsonl" ]; then
    step "$python" "$here/ten.py" pairs --data "$data" --output "$output"
    step env DATA="$output" MODEL="$model" LAUNCH="$bin/launch" MINE="--negatives 5 --relative-margin 0.05 --max-length $length" "$root/scripts/zeta/mine.sh"
    step "$python" "$here/ten.py" rows --data "$data" --output "$output"
fi

[ -d "$output/run/model" ] || step "$bin/launch" --resume "$root/configs/minilm.yaml" output="$output/run" model.path="$model" \
    model.dropout=0 model.max_query_length=$length model.max_document_length=$length \
    data.train="[{name: ten, path: $output/train.jsonl}]" data.negatives=1 data.no_duplicates=false \
    data.shuffle=false loss.temperature=$temperature loss.mask_known_positives=false training.learning_rate=$rate training.decay_all=true \
    evaluation.sets='[]'
[ -d "$output/peer" ] || step "$python" "$peer" --model "$model" --data "$output/train.jsonl" --batch 64 --mini-batch 16 \
    --negatives 1 --max-length $length --temperature $temperature --lr $rate --no-dropout --save "$output/peer" >"$output/peer.json"

sets=("$data/ir-scifact" "$data/ir-cisi" "$data/ir-cranfield" "$output/xquad-en" "$output/xquad-de")
for side in "$model" "$output/run/model" "$output/peer"; do
    [ "$side" = "$model" ] && name=before || name=$(basename "${side%/model}")
    [ -f "$output/$name.scores" ] && continue
    step "$bin/trainer" evaluate --model "$side" --max-length $length --set "${sets[@]}" >"$output/$name.part"
    mv "$output/$name.part" "$output/$name.scores"
done
"$python" - "$output" <<'END'
import json, sys
sides = [json.load(open(f"{sys.argv[1]}/{name}.scores")) for name in ("before", "run", "peer")]
print("| nDCG@10 | before | lodestone | sentence-transformers |\n|---|--:|--:|--:|")
keys = [key for key in sides[0] if key.endswith("cosine_ndcg@10")]
for key in keys:
    print("| " + key.removesuffix("_cosine_ndcg@10") + " | " + " | ".join(f"{side[key]:.4f}" for side in sides) + " |")
print("| mean | " + " | ".join(f"{sum(side[key] for key in keys) / len(keys):.4f}" for side in sides) + " |")
END

#!/usr/bin/env bash
# The mixture of ten sets (ten.py): negatives mined here, all-MiniLM-L6-v2 trained here and by sentence-transformers on the same rows
# with the same settings, nDCG@10 of five retrieval sets for the model before and both after.
#
#   DATA=FOLDER PEER=PATH/st_train.py PYTHON=… scripts/reference/ten.sh
#
# MODEL, OUTPUT and BIN as for scripts/seeds. PYTHON has sentence-transformers. About 15 minutes on two cores.
source "$(dirname "$0")/../seeds/common.sh"
peer=${PEER:?must name st_train.py}
here=$(cd "$(dirname "$0")" && pwd)
length=128 rate=2.0e-5 temperature=0.05

if ! [ -f "$output/train.jsonl" ]; then
    step "$python" "$here/ten.py" pairs --data "$data" --output "$output"
    step env DATA="$output" MODEL="$model" LAUNCH="$bin/launch" NEGATIVES=10 "$root/scripts/zeta/mine.sh"
    step "$python" "$here/ten.py" rows --data "$data" --output "$output"
fi

[ -d "$output/run/model" ] || step "$bin/launch" "$root/configs/minilm.yaml" output="$output/run" model.path="$model" \
    model.dropout=0 model.max_query_length=$length model.max_document_length=$length \
    data.train="[{name: ten, path: $output/train.jsonl}]" data.negatives=2 data.no_duplicates=false \
    loss.temperature=$temperature loss.mask_known_positives=false training.learning_rate=$rate training.decay_all=true \
    evaluation.sets='[]'
[ -d "$output/peer" ] || step "$python" "$peer" --model "$model" --data "$output/train.jsonl" --batch 64 --mini-batch 16 \
    --negatives 2 --max-length $length --temperature $temperature --lr $rate --no-dropout --save "$output/peer" >"$output/peer.json"

sets=("$data/ir-scifact" "$data/ir-cisi" "$data/ir-cranfield" "$output/xquad-en" "$output/xquad-de")
for side in run/model peer; do
    step "$bin/trainer" compare --base "$model" --tuned "$output/$side" --max-length $length --set "${sets[@]}" \
        --output "$output/compare-${side%%/*}"
done

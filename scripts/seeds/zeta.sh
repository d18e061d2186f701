#!/usr/bin/env bash
# configs/zeta.yaml at small scale: mines hard negatives for eight data sets of its five kinds, makes Nano sets, trains a small
# model with LoRA and early stopping, and compares it with its base. Variables: scripts/seeds/common.sh.
#
#   DATA=FOLDER scripts/seeds/zeta.sh [KEY=VALUE …]
source "$(dirname "$0")/common.sh"

prepared zeta
step env DATA="$output" MODEL="$model" LAUNCH="$bin/launch" "$root/scripts/zeta/mine.sh"
for set in scifact cranfield cisi; do
    [ -d "$output/nano/$set" ] ||
        step "$bin/trainer" nano --set "$data/ir-$set" --output "$output/nano/$set" --model "$model"
done

# As in the configuration: queries have an instruction; for classes and similar sentences, all texts have it.
retrieval() { echo "{name: $1, path: $output/$1.jsonl, samples: $2, query_prompt: \"Instruct: $3\\nQuery: \"}"; }
alike() {
    local prompt="\"Instruct: $3\\nQuery: \""
    echo "{name: $1, path: $output/$1.jsonl, samples: $2, query_prompt: $prompt, document_prompt: $prompt$4}"
}
banking='Given a online banking query, find the corresponding intents'
emotion='Classify the emotion expressed in the given Twitter message into one of the six emotions: anger, fear, joy, love, sadness, and surprise'
amazon='Classify a given Amazon customer review text as either counterfactual or not-counterfactual'
claim='Given a scientific claim, retrieve documents that support or refute the claim'
science='Given a question, retrieve relevant documents that best answer the question'
train="[$(retrieval scifact 900 "$claim"), $(retrieval covidqa 1000 "$science"),
    $(retrieval squad 1000 'Given a question, retrieve Wikipedia passages that answer the question'),
    $(retrieval nli 600 'Given a premise, retrieve a hypothesis that is entailed by the premise'),
    $(alike banking77 300 "$banking" ', kind: labelled'), $(alike emotion 300 "$emotion" ', kind: labelled'),
    $(alike amazon-counterfactual 200 "$amazon" ', kind: labelled'),
    $(alike stsbenchmark 400 'Retrieve semantically similar text.' '')]"
set_of() { echo "{name: Nano-$1, path: $output/nano/$1, query_prompt: \"Instruct: $2\\nQuery: \"}"; }
sets="[$(set_of scifact "$claim"), $(set_of cranfield "$science"), $(set_of cisi "$science")]"

step "$bin/launch" --resume "$root/configs/zeta.yaml" model.path="$model" model.pooling=mean model.dtype=f32 output="$output/run" \
    model.max_query_length=64 model.max_document_length=128 training.batch_size=64 training.learning_rate=1.0e-3 \
    data.train="$train" evaluation.sets="$sets" evaluation.every=10 evaluation.patience=3 training.epochs=2 "$@"
[ -d "$output/model" ] || step "$bin/trainer" export --run "$output/run" --output "$output/model" --merge --checkpoint best
for set in scifact cranfield cisi; do
    prompt=$science
    [ $set = scifact ] && prompt=$claim
    step "$bin/trainer" compare --base "$model" --tuned "$output/model" --set "$output/nano/$set" \
        --query-prompt "Instruct: $prompt"$'\nQuery: ' --document-prompt '' --output "$output/$set"
done

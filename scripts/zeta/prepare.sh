#!/usr/bin/env bash
# Fetches the sets of configs/zeta.yaml, but for NLI, which is read from the hub, and writes them as the trainer reads them. docs/data.md says where each comes from.
#
#   scripts/zeta/prepare.sh [NAME …]         default: all that are not there yet
#
#   data/zeta/NAME.jsonl                     rows that are whole: classes, and sets that come with negatives
#   data/zeta/{pairs,corpus}/NAME.jsonl      what scripts/zeta/mine.sh makes the others from
#
# DATA=FOLDER puts them elsewhere, PYTHON=… names a Python that has `pip install datasets`. BEIR's archives stay in DATA/raw, about
# 10 GB unpacked. AMAZON_REVIEWS says where the reviews are, which Amazon no longer hands out (docs/data.md).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
data=${DATA:-$here/../../data/zeta}
python=${PYTHON:-python3}
beir_url=https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets
mkdir -p "$data"/{raw,pairs,corpus}

run() { "$python" "$here/$1.py" "${@:2}"; }

# Pairs and the corpus to mine from: SCRIPT, NAME and the script's arguments.
mined() { run "$1" "${@:3}" --output "$data/pairs/$2.jsonl" --corpus "$data/corpus/$2.jsonl"; }

# Whole rows: SCRIPT, NAME and the script's arguments.
whole() { run "$1" "${@:3}" --output "$data/$2.jsonl"; }

beir() {
    local folder=$data/raw/$2
    if ! [ -d "$folder/qrels" ]; then
        curl --fail --location --retry 5 --continue-at - --output "$folder.zip" "$beir_url/$2.zip"
        "$python" -m zipfile --extract "$folder.zip" "$data/raw"
        rm "$folder.zip"
    fi
    mined beir "$1" --folder "$folder" "${@:3}"
}

prepare() {
    case $1 in
        arguana) beir arguana arguana --arguana ;;
        fever) beir fever fever --rows queries ;;
        fiqa) beir fiqa fiqa ;;
        hotpotqa) beir hotpotqa hotpotqa --rows queries ;;
        msmarco) beir msmarco msmarco --rows queries ;;
        nfcorpus) beir nfcorpus nfcorpus ;;
        scifact) beir scifact scifact ;;
        nq) mined qa nq nq --source sentence-transformers/natural-questions:pair ;;
        squad) mined qa squad squad --source rajpurkar/squad ;;
        triviaqa) mined qa triviaqa triviaqa --source sentence-transformers/trivia-qa-triplet:triplet ;;
        stackexchange) stackexchange ;;
        scirep) whole qa scirep scirep --source allenai/scirepeval:search --without mteb/scidocs:corpus:corpus ;;
        arxiv-s2s | arxiv-p2p | biorxiv-s2s | biorxiv-p2p | medrxiv-s2s | medrxiv-p2p)
            whole papers "$1" --source "mteb/raw_${1%-*}" --text "${1#*-}" --without "mteb/${1%-*}-clustering-${1#*-}::test" ;;
        amazon-counterfactual) classes "$1" mteb/amazon_counterfactual:en ;;
        amazon-reviews)
            : "${AMAZON_REVIEWS:?must name the reviews: a file with text and label, or a copy on the hub; see docs/data.md}"
            classes "$1" "$AMAZON_REVIEWS" ;;
        banking77) classes "$1" mteb/banking77 ;;
        emotion) classes "$1" mteb/emotion ;;
        mtop-intent) classes "$1" mteb/mtop_intent:en ;;
        toxic-conversations) classes "$1" mteb/toxic_conversations_50k ;;
        tweet-sentiment) classes "$1" mteb/tweet_sentiment_extraction ;;
        imdb) classes "$1" mteb/imdb ;;
        sts12) mined similarity "$1" --source mteb/sts12-sts --without mteb/sts12-sts::test ;;
        sts22) mined similarity "$1" --source mteb/sts22-crosslingual-sts:en --without mteb/sts22-crosslingual-sts:en:test ;;
        stsbenchmark) mined similarity "$1" --source mteb/stsbenchmark-sts --without mteb/stsbenchmark-sts::test ;;
        *) echo "prepare.sh: no set \`$1\`; there are ${names[*]}" >&2; exit 2 ;;
    esac
}

# Texts that the set's own test split has are left out.
classes() { whole classes "$1" --source "$2" --without "$(tested "$2")"; }

tested() {
    case $1 in
        *:*) echo "$1:test" ;;
        *) echo "$1::test" ;;
    esac
}

stackexchange() {
    local from=flax-sentence-embeddings/stackexchange_titlebody_best_voted_answer_jsonl sources=()
    for site in ${STACKEXCHANGE:-superuser askubuntu serverfault unix physics english gaming electronics stats tex}; do
        sources+=("$from:$site")
    done
    mined qa stackexchange stackexchange --source "${sources[@]}"
}

names=(arguana fever fiqa hotpotqa msmarco nfcorpus nq scifact squad stackexchange triviaqa scirep arxiv-s2s arxiv-p2p
    biorxiv-s2s biorxiv-p2p medrxiv-s2s medrxiv-p2p amazon-counterfactual amazon-reviews banking77 emotion mtop-intent
    toxic-conversations tweet-sentiment imdb sts12 sts22 stsbenchmark)

if [ $# -gt 0 ]; then
    for name in "$@"; do prepare "$name"; done
else
    for name in "${names[@]}"; do
        [ -f "$data/$name.jsonl" ] || [ -f "$data/pairs/$name.jsonl" ] || prepare "$name"
    done
fi

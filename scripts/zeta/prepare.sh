#!/usr/bin/env bash
# Downloads the data sets of configs/zeta.yaml, except NLI, which the trainer reads from the hub, and converts them for the
# trainer. docs/recipes.md has their sources.
#
#   scripts/zeta/prepare.sh [NAME …]         default: all data sets that do not exist yet
#
#   data/zeta/NAME.jsonl                     data sets with class labels or with negatives, ready for training
#   data/zeta/pairs/NAME{.jsonl,/}           other data sets, rows or BEIR folders: input of scripts/zeta/mine.sh
#   data/zeta/corpus/NAME.jsonl              more texts to mine negatives from
#
# DATA=FOLDER is the folder to write, PYTHON=… a Python with the package `datasets`. The BEIR folders take about 10 GB.
# AMAZON_REVIEWS is the source of the Amazon reviews, which Amazon no longer distributes (docs/recipes.md).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
data=${DATA:-$here/../../data/zeta}
python=${PYTHON:-python3}
beir_url=https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets
names=(arguana fever fiqa hotpotqa msmarco nfcorpus nq scifact squad stackexchange triviaqa scirep arxiv-s2s arxiv-p2p biorxiv-s2s
    biorxiv-p2p medrxiv-s2s medrxiv-p2p amazon-counterfactual amazon-reviews banking77 emotion mtop-intent toxic-conversations
    tweet-sentiment imdb sts12 sts22 stsbenchmark)
mkdir -p "$data"/{pairs,corpus}

# FILE SCRIPT ARGUMENT …
write() { "$python" "$here/$2.py" "${@:3}" --output "$data/$1.jsonl"; }

beir() {
    local folder=$data/pairs/$1
    [ -d "$folder/qrels" ] && return
    curl --fail --location --retry 5 --continue-at - --output "$folder.zip" "$beir_url/$1.zip"
    "$python" -m zipfile --extract "$folder.zip" "$data/pairs"
    rm "$folder.zip"
}

# NAME SOURCE: leaves out texts of the test split.
classes() {
    local test=$2::test
    case $2 in *:*) test=$2:test ;; esac
    write "$1" classes --source "$2" --without "$test"
}

similarity() {
    local test=$2::test
    case $2 in *:*) test=$2:test ;; esac
    write "pairs/$1" similarity --source "$2" --without "$test" --corpus "$data/corpus/$1.jsonl"
}

stackexchange() {
    local sources=() from=flax-sentence-embeddings/stackexchange_titlebody_best_voted_answer_jsonl
    for site in ${STACKEXCHANGE:-superuser askubuntu serverfault unix physics english gaming electronics stats tex}; do
        sources+=("$from:$site")
    done
    write pairs/stackexchange qa stackexchange --source "${sources[@]}"
}

prepare() {
    echo "$1" >&2
    case $1 in
        arguana)
            beir arguana
            write pairs/arguana arguana --folder "$data/pairs/arguana"
            mv "$data/pairs/arguana/corpus.jsonl" "$data/corpus/arguana.jsonl"
            rm -r "$data/pairs/arguana" ;;
        fever | fiqa | hotpotqa | msmarco | nfcorpus | scifact) beir "$1" ;;
        nq) write pairs/nq qa nq --source sentence-transformers/natural-questions:pair ;;
        squad) write pairs/squad qa squad --source rajpurkar/squad ;;
        triviaqa) write pairs/triviaqa qa triviaqa --source sentence-transformers/trivia-qa-triplet:triplet ;;
        stackexchange) stackexchange ;;
        scirep) write scirep qa scirep --source allenai/scirepeval:search --without mteb/scidocs:corpus:corpus ;;
        arxiv-* | biorxiv-* | medrxiv-*)
            write "$1" papers --source "mteb/raw_${1%-*}" --text "${1#*-}" --without "mteb/${1%-*}-clustering-${1#*-}::test" ;;
        amazon-counterfactual) classes "$1" mteb/amazon_counterfactual:en ;;
        amazon-reviews)
            : "${AMAZON_REVIEWS:?must name the reviews: a file with text and label, or a copy on the hub; see docs/recipes.md}"
            write "$1" classes --source "$AMAZON_REVIEWS" ;;
        banking77 | emotion | imdb) classes "$1" "mteb/$1" ;;
        mtop-intent) classes "$1" mteb/mtop_intent:en ;;
        toxic-conversations) classes "$1" mteb/toxic_conversations_50k ;;
        tweet-sentiment) classes "$1" mteb/tweet_sentiment_extraction ;;
        sts12) similarity "$1" mteb/sts12-sts ;;
        sts22) similarity "$1" mteb/sts22-crosslingual-sts:en ;;
        stsbenchmark) similarity "$1" mteb/stsbenchmark-sts ;;
        *) echo "prepare.sh: no set \`$1\`; there are ${names[*]}" >&2; exit 2 ;;
    esac
}

if [ $# -gt 0 ]; then
    for name in "$@"; do prepare "$name"; done
else
    # Fails before hours of downloads.
    [ -f "$data/amazon-reviews.jsonl" ] ||
        : "${AMAZON_REVIEWS:?must name the reviews: a file with text and label, or a copy on the hub; see docs/recipes.md}"
    for name in "${names[@]}"; do
        [ -f "$data/$name.jsonl" ] || [ -f "$data/pairs/$name.jsonl" ] || [ -d "$data/pairs/$name/qrels" ] || prepare "$name"
    done
fi

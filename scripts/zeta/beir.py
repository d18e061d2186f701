#!/usr/bin/env python3
"""Training pairs of a BEIR folder, and the corpus that their hard negatives are mined from.

    beir.py --folder raw/fiqa --output data/zeta/pairs/fiqa.jsonl --corpus data/zeta/corpus/fiqa.jsonl

A row is a relevant pair of qrels/SPLIT.tsv: its own document stands first among the query's positives, the others follow, so
that they are never taken for negatives. --rows queries gives one row a query instead.

ArguAna has no training qrels: --arguana pairs each argument of its training debates with its counter, which the ids tell
(`training-…-pro01a` and `training-…-pro01b`).
"""

import csv
from pathlib import Path

from source import Writer, joined, parser, rows, squeezed


def judged(folder, split):
    """Query id to the ids of its relevant documents, in the order of the file."""
    found = {}
    with open(folder / "qrels" / f"{split}.tsv", encoding="utf-8") as file:
        for query, document, score in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if score.strip().lstrip("-").isdigit() and int(score) > 0:
                found.setdefault(query, []).append(document)
    return found


def counters(corpus):
    """Argument to counter, of the debates that BEIR does not ask about."""
    return {name: [name[:-1] + "b"] for name in corpus
            if name.startswith("training-") and name.endswith("a") and name[:-1] + "b" in corpus}


def main():
    cli = parser(__doc__)
    cli.add_argument("--folder", type=Path, required=True, help="corpus.jsonl, queries.jsonl and qrels/")
    cli.add_argument("--corpus", required=True, help="where the corpus goes, a text a line")
    cli.add_argument("--split", default="train")
    cli.add_argument("--rows", choices=["pairs", "queries"], default="pairs")
    cli.add_argument("--arguana", action="store_true")
    args = cli.parse_args()

    corpus = {row["_id"]: joined(row.get("title"), row["text"]) for row in rows(args.folder / "corpus.jsonl")}
    if args.arguana:
        answers, queries = counters(corpus), corpus
    else:
        answers = judged(args.folder, args.split)
        queries = {row["_id"]: squeezed(row["text"]) for row in rows(args.folder / "queries.jsonl") if row["_id"] in answers}

    pairs = Writer(args.output, args.without)
    for query, documents in answers.items():
        positives = [corpus[document] for document in documents if corpus.get(document)]
        count = len(positives) if args.rows == "pairs" else min(1, len(positives))
        for first in range(count):
            own = positives[first:] + positives[:first]
            pairs.row(query=queries[query], positive=own if len(own) > 1 else own[0])
    pairs.done()

    texts = Writer(args.corpus)
    for text in corpus.values():
        texts.row(text=text)
    texts.done()


if __name__ == "__main__":
    main()

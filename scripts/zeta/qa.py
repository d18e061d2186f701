#!/usr/bin/env python3
"""Writes questions and the passages that answer them, from data sets that are not BEIR folders.

    qa.py squad         --source rajpurkar/squad | train-v1.1.json     question → title and paragraph
    qa.py nq            --source sentence-transformers/natural-questions:pair
    qa.py triviaqa      --source sentence-transformers/trivia-qa-triplet:triplet
    qa.py stackexchange --source superuser.com.jsonl.gz math.stackexchange.com.jsonl.gz …
    qa.py scirep        --source allenai/scirepeval:search

Rows have query, positive and, if the data set has them, negatives. A repeated question becomes one row with all its passages. In
the searches of SciRepEval, clicked papers are positives; papers that were shown but not clicked are negatives.
"""

from source import Writer, column, joined, parser, rows, squeezed

QUESTION = ["query", "question", "anchor", "title_body"]
PASSAGE = ["positive", "answer", "upvoted_answer", "passage"]


def squad(row, _):
    title = row.get("title", "").replace("_", " ")
    return row["question"], [joined(title, row["context"])], []


def pair(row, source):
    negative = row.get("negative")
    return column(row, QUESTION, source), [column(row, PASSAGE, source)], [negative] if negative else []


def searched(row, _):
    papers = sorted(row["candidates"], key=lambda paper: -paper["score"])
    texts = [(joined(paper.get("title"), paper.get("abstract")), paper["score"] > 0) for paper in papers]
    return row["query"], [text for text, clicked in texts if clicked], [text for text, clicked in texts if not clicked]


READ = {"squad": squad, "nq": pair, "triviaqa": pair, "stackexchange": pair, "scirep": searched}


def main():
    cli = parser(__doc__)
    cli.add_argument("set", choices=READ)
    cli.add_argument("--source", nargs="+", required=True)
    cli.add_argument("--negatives", type=int, default=20, help="maximum number per question")
    args = cli.parse_args()

    # Dicts keep the order and deduplicate.
    questions = {}
    for source in args.source:
        for row in rows(source):
            query, positives, negatives = READ[args.set](row, source)
            if not isinstance(query, str):
                continue  # in SciRepEval, queries of other tasks are papers
            known = questions.setdefault(squeezed(query), ({}, {}))
            for texts, found in zip(known, (positives, negatives)):
                texts.update((squeezed(text), None) for text in found)

    pairs = Writer(args.output, args.without)
    for query, (positives, negatives) in questions.items():
        row = {"query": query, "positive": list(positives)}
        if negatives := [text for text in negatives if text not in positives][: args.negatives]:
            row["negatives"] = negatives
        pairs.row(**row)
    pairs.done()


if __name__ == "__main__":
    main()

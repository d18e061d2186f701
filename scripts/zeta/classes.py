#!/usr/bin/env python3
"""Writes texts with class labels as labelled rows.

    classes.py --source mteb/banking77 --output data/zeta/banking77.jsonl
    classes.py --source train.csv --label sentiment --output data/zeta/tweet-sentiment.jsonl --without mteb/tweet_sentiment_extraction::test

A text with two different labels is left out.
"""

from source import Writer, column, key, parser, rows, squeezed

TEXT = ["text", "sentence", "utterance"]
LABEL = ["label_text", "label", "category", "sentiment", "is_counterfactual"]


def main():
    cli = parser(__doc__)
    cli.add_argument("--source", required=True)
    cli.add_argument("--text", help=f"column of the text; default: the first of {', '.join(TEXT)}")
    cli.add_argument("--label", help=f"column of the label; default: the first of {', '.join(LABEL)}")
    args = cli.parse_args()

    found = {}
    for row in rows(args.source):
        text = squeezed(column(row, [args.text] if args.text else TEXT, args.source))
        label = squeezed(column(row, [args.label] if args.label else LABEL, args.source))
        found.setdefault(key(text), (text, set()))[1].add(label)
    written = Writer(args.output, args.without)
    for text, labels in found.values():
        if len(labels) == 1:
            written.row(text=text, label=labels.pop())
        else:
            written.counts["two classes"] += 1
    written.done()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes pairs of similar sentences, and all sentences as the corpus to mine negatives from.

    similarity.py --source mteb/stsbenchmark-sts --least 3 --output data/zeta/pairs/stsbenchmark.jsonl --corpus data/zeta/corpus/stsbenchmark.jsonl

Pairs with a score of at least --least become rows. --scored writes all pairs with their scores instead, for losses that use
scores.
"""

from source import Writer, column, parser, rows, squeezed


def main():
    cli = parser(__doc__)
    cli.add_argument("--source", required=True)
    cli.add_argument("--least", type=float, default=3.0, help="default: 3")
    cli.add_argument("--corpus", help="also write all sentences to this file, one per line")
    cli.add_argument("--scored", action="store_true")
    args = cli.parse_args()

    written, sentences = Writer(args.output, args.without), {}
    for row in rows(args.source):
        first, second = (squeezed(column(row, [f"sentence{n}", f"s{n}"], args.source)) for n in (1, 2))
        score = float(column(row, ["score", "similarity_score"], args.source))
        sentences.update(dict.fromkeys((first, second)))
        if args.scored:
            written.row(sentence1=first, sentence2=second, score=score)
        elif score >= args.least and first != second:
            written.row(query=first, positive=second)
        else:
            written.counts["not alike"] += 1
    written.done()
    if args.corpus:
        texts = Writer(args.corpus)
        for sentence in sentences:
            texts.row(text=sentence)
        texts.done()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Sentences that people found alike, as pairs, and all sentences as the corpus that their negatives are mined from.

    similarity.py --source mteb/stsbenchmark-sts --least 3 --output data/zeta/pairs/stsbenchmark.jsonl --corpus data/zeta/corpus/stsbenchmark.jsonl

A pair with a score of --least or above is a row. --scored writes every pair with its score instead, for a loss that learns from
scores.
"""

from source import Writer, column, parser, rows, squeezed


def main():
    cli = parser(__doc__)
    cli.add_argument("--source", required=True)
    cli.add_argument("--least", type=float, default=3.0, help="default: 3")
    cli.add_argument("--corpus", help="write every sentence here too, a text a line")
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

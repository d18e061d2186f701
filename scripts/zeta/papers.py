#!/usr/bin/env python3
"""Writes papers with their category as labelled rows: titles (s2s), or titles with abstracts (p2p).

    papers.py --source mteb/raw_biorxiv --text s2s --output data/zeta/biorxiv-s2s.jsonl --without mteb/biorxiv-clustering-s2s::test

The source has title, abstract and category, or categories of arXiv with the primary one first: `cs.CL cs.LG`. Categories with
fewer than --least papers are left out, since a row needs others of its class.
"""

from collections import Counter

from source import Writer, column, joined, parser, rows, squeezed


def main():
    cli = parser(__doc__)
    cli.add_argument("--source", required=True)
    cli.add_argument("--text", choices=["s2s", "p2p"], required=True)
    cli.add_argument("--least", type=int, default=20)
    args = cli.parse_args()

    def label(row):
        if "categories" not in row:
            return squeezed(column(row, ["category"], args.source))
        found = row["categories"]
        return (found if isinstance(found, list) else found.split())[0]

    papers = Counter(label(row) for row in rows(args.source))
    written = Writer(args.output, args.without)
    for row in rows(args.source):
        if papers[label(row)] >= args.least:
            title = squeezed(row["title"])
            written.row(text=title if args.text == "s2s" else joined(title, row["abstract"]), label=label(row))
    written.done()


if __name__ == "__main__":
    main()

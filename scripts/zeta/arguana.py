#!/usr/bin/env python3
"""Training pairs of ArguAna, for which BEIR has none: each argument of the training debates with its counter.

    arguana.py --folder data/zeta/pairs/arguana --output data/zeta/pairs/arguana.jsonl

BEIR's corpus holds all debates, and asks only about those whose ids begin with `test-`. Ids tell which arguments belong together:
`training-international-apdwhbpa-pro01a` is answered by `training-international-apdwhbpa-pro01b`.
"""

from pathlib import Path

from source import Writer, joined, parser, rows


def main():
    cli = parser(__doc__)
    cli.add_argument("--folder", type=Path, required=True, help="where corpus.jsonl lies")
    args = cli.parse_args()
    corpus = {row["_id"]: joined(row.get("title"), row["text"]) for row in rows(args.folder / "corpus.jsonl")}
    pairs = Writer(args.output, args.without)
    for name, argument in corpus.items():
        counter = corpus.get(name[:-1] + "b")
        if name.startswith("training-") and name.endswith("a") and counter:
            pairs.row(query=argument, positive=counter)
    pairs.done()


if __name__ == "__main__":
    main()

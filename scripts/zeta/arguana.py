#!/usr/bin/env python3
"""Writes training pairs for ArguAna, which has none in BEIR: arguments of the training debates with their counterarguments.

    arguana.py --folder data/zeta/pairs/arguana --output data/zeta/pairs/arguana.jsonl

The corpus of BEIR has all debates; its queries are only those whose ids begin with `test-`. Ids name the pairs:
`training-international-apdwhbpa-pro01b` is the counterargument of `training-international-apdwhbpa-pro01a`.
"""

from pathlib import Path

from source import Writer, joined, parser, rows


def main():
    cli = parser(__doc__)
    cli.add_argument("--folder", type=Path, required=True, help="folder of corpus.jsonl")
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

#!/usr/bin/env python3
"""Writes the published NanoBEIR sets as BEIR folders.

    nano.py --output data/nano [--sets SciFact NQ …] [--source zeta-alpha-ai/Nano{}]

Fetches each set from the hub, or reads it from a local folder given as --source (`copies/Nano{}`, with corpus, queries and qrels
as folders of Parquet files). `trainer nano` makes such a set from any BEIR folder.
"""

import argparse
import json
from pathlib import Path

from source import rows

SETS = ["ArguAna", "ClimateFEVER", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NFCorpus", "NQ", "QuoraRetrieval",
        "SCIDOCS", "SciFact", "Touche2020"]


def part(source, name):
    folder = Path(source) / name
    if not folder.is_dir():
        return list(rows(f"{source}:{name}"))
    return [row for file in sorted(folder.glob("*.parquet")) for row in rows(file)]


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--output", type=Path, required=True)
    cli.add_argument("--sets", nargs="+", default=SETS, metavar="NAME", help=f"default: {' '.join(SETS)}")
    cli.add_argument("--source", default="zeta-alpha-ai/Nano{}", help="default: %(default)s")
    args = cli.parse_args()
    for name in args.sets:
        source, folder = args.source.format(name), args.output / f"Nano{name}"
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        counts = {"set": folder.name}
        for kind in ("corpus", "queries"):
            # NanoBEIREvaluator of sentence-transformers skips empty texts too.
            texts = [row for row in part(source, kind) if row["text"].strip()]
            counts[kind] = len(texts)
            with open(folder / f"{kind}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"_id": row["_id"], "text": row["text"]}, ensure_ascii=False) + "\n" for row in texts)
        judged = part(source, "qrels")
        counts["qrels"] = len(judged)
        with open(folder / "qrels" / "test.tsv", "w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            file.writelines(f"{row['query-id']}\t{row['corpus-id']}\t{row.get('score', 1)}\n" for row in judged)
        print(json.dumps(counts))


if __name__ == "__main__":
    main()

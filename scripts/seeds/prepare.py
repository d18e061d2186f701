#!/usr/bin/env python3
"""Writes the data of the recipes at small scale, from a folder of real text.

    prepare.py --data FOLDER --output FOLDER e5 | nli | zeta

FOLDER has one folder per data set, with JSON lines: qa-xquad (pairs.{en,de}.jsonl: query, positive), qa-covidqa (pairs, faq.pairs: query,
positive, lang), qa-squad-sent (pairs.jsonl.gz), nli-snli (triplets: query, positive, negative, kind), cls-banking77 and
cls-emotion (train: text, label), cls-amazon-counterfactual (en.train), sts-b (en.train: s1, s2, score), ir-scifact (BEIR).
"""

import argparse
import csv
import gzip
import json
from pathlib import Path


def lines(path):
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as file:
        return [json.loads(line) for line in file]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows")


def e5(data, output):
    """Writes a table of questions and answers in English and German."""
    rows = [row for name in ("en", "de") for row in lines(data / "qa-xquad" / f"pairs.{name}.jsonl")]
    rows += lines(data / "qa-covidqa" / "pairs.jsonl")
    rows += [row for row in lines(data / "qa-covidqa" / "faq.pairs.jsonl") if row["lang"] in ("en", "de")]
    with open(output / "qa.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Question", "Answer"])
        table.writerows((row["query"], row["positive"]) for row in rows)
    print(f"{output / 'qa.csv'}: {len(rows)} rows")


def nli(data, output):
    """Writes triplets as in AllNLI: a premise, an entailed sentence, a contradicting one."""
    rows = [row for row in lines(data / "nli-snli" / "triplets.jsonl") if row["kind"] == "ent-con"]
    write(output / "all.jsonl", [{"anchor": r["query"], "positive": r["positive"], "negative": r["negative"]} for r in rows])


def zeta(data, output):
    """Writes retrieval pairs, triplets, classes and similarity as scripts/zeta does."""
    pairs = {
        "covidqa": [row for row in lines(data / "qa-covidqa" / "pairs.jsonl")],
        "squad": [row for row in lines(data / "qa-squad-sent" / "pairs.jsonl.gz") if row["split"] == "test"][:4000],
    }
    for name, rows in pairs.items():
        write(output / "pairs" / f"{name}.jsonl", [{"query": row["query"], "positive": row["positive"]} for row in rows])
    alike = [row for row in lines(data / "sts-b" / "en.train.jsonl") if row["score"] >= 3]
    write(output / "pairs" / "stsbenchmark.jsonl", [{"query": row["s1"], "positive": row["s2"]} for row in alike])
    folder = output / "pairs" / "scifact"
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        (folder / name).write_bytes((data / "ir-scifact" / name).read_bytes())
    triplets = lines(data / "nli-snli" / "triplets.jsonl")
    write(output / "nli.jsonl", [{"anchor": r["query"], "positive": r["positive"], "negative": r["negative"]} for r in triplets])
    for name, path in (("banking77", "cls-banking77/train.jsonl"), ("emotion", "cls-emotion/train.jsonl"),
                       ("amazon-counterfactual", "cls-amazon-counterfactual/en.train.jsonl")):
        write(output / f"{name}.jsonl", lines(data / path))


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--data", type=Path, required=True)
    cli.add_argument("--output", type=Path, required=True)
    cli.add_argument("recipe", choices=["e5", "nli", "zeta"])
    args = cli.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    {"e5": e5, "nli": nli, "zeta": zeta}[args.recipe](args.data, args.output)


if __name__ == "__main__":
    main()

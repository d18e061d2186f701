#!/usr/bin/env python3
"""Writes a mixture of ten public data sets (questions, entailment, classes, similarity) with one hard negative per row.

    ten.py pairs --data FOLDER --output OUT      OUT/pairs/NAME.jsonl and OUT/corpus: input of mining
    DATA=OUT MODEL=… scripts/zeta/mine.sh
    ten.py rows --data FOLDER --output OUT       OUT/train.jsonl (query, positive, negatives, source), OUT/xquad-{en,de}

Negatives of questions and of similar sentences are mined. The negative of an entailment is a contradicting sentence; for a text
with a class label, the positive has the same class and the negative another. Each batch has rows of one source and no text twice,
because trainers that do not mask duplicates would use the copy of a positive as a negative. Of SciFact only the claims of the
train split are used, of SQuAD no questions of XQuAD.
"""

import argparse
import json
import random
from pathlib import Path

from mixture import detokenize, lines, pairs, scifact, write, write_retrieval

NEGATIVES = 1
# Number of rows per source, in whole batches.
ROWS = {
    "scifact": 320,
    "medquad": 128,
    "covidqa": 64,
    "covidqa-faq": 64,
    "squad-sent": 128,
    "mssql-de": 128,
    "snli": 64,
    "banking77": 64,
    "sts-b-en": 64,
    "sts-b-de": 64,
}
# Factor of pairs to mine: some have no negatives, and some do not fit into a batch without duplicates.
SPARE = 3


def questions(data):
    alike = {f"sts-b-{language}": [(row["s1"], row["s2"]) for row in lines(data / "sts-b" / f"{language}.train.jsonl")
                                   if row["score"] >= 4 and row["s1"] != row["s2"]] for language in ("en", "de")}
    return {
        "scifact": scifact(data / "ir-scifact"),
        "medquad": pairs(data / "qa-medquad" / "pairs.jsonl.gz"),
        "covidqa": pairs(data / "qa-covidqa" / "pairs.jsonl"),
        "covidqa-faq": pairs(data / "qa-covidqa" / "faq.pairs.jsonl", lambda row: row["lang"] in ("de", "en")),
        "squad-sent": [(detokenize(q), detokenize(p)) for q, p in
                       pairs(data / "qa-squad-sent" / "pairs.jsonl.gz", lambda row: row["split"] != "dev")],
        "mssql-de": pairs(data / "docs-mssql-de" / "pairs.de.jsonl.gz", lambda row: len(row["positive"]) > 200),
    } | alike


def write_pairs(data, output, pick):
    for name, found in questions(data).items():
        found = list(dict.fromkeys(found))
        pick.shuffle(found)
        rows = [{"query": query, "positive": positive} for query, positive in found[: ROWS[name] * SPARE]]
        write(output / "pairs" / f"{name}.jsonl", rows)
    texts = [{"text": f"{row['title']} {row['text']}"} for row in lines(data / "ir-scifact" / "corpus.jsonl")]
    write(output / "corpus" / "scifact.jsonl", texts)


def mined(output, name):
    rows = lines(output / f"{name}.jsonl")
    return [(row["query"], row["positive"], row["negatives"]) for row in rows if len(row["negatives"]) >= NEGATIVES]


def entailed(data):
    """Returns premises with an entailed and a contradicting sentence."""
    rows = lines(data / "nli-snli" / "triplets.jsonl")
    return [(row["query"], row["positive"], [row["negative"]]) for row in rows if row["kind"] == "ent-con"]


def classes(path, pick):
    rows = [(row["text"], row["label"]) for row in lines(path)]
    of_class = {}
    for text, label in rows:
        of_class.setdefault(label, []).append(text)
    found = []
    for text, label in rows:
        same = [other for other in of_class[label] if other != text]
        others = pick.sample([name for name in of_class if name != label], NEGATIVES)
        if same:
            found.append((text, pick.choice(same), [pick.choice(of_class[name]) for name in others]))
    return found


def batches(rows, count, size):
    """Returns the first `count` rows in batches without duplicate texts; rows that do not fit go into the next batch."""
    waiting, made = list(rows), []
    while len(made) * size < count:
        batch, texts, left = [], set(), []
        for row in waiting:
            own = {row[0], row[1], *row[2][:NEGATIVES]}
            if len(batch) < size and len(own) == NEGATIVES + 2 and not own & texts:
                batch.append(row)
                texts |= own
            else:
                left.append(row)
        if len(batch) < size:
            break
        made.append(batch)
        waiting = left
    return made


def write_rows(data, output, pick, size):
    sources = {name: mined(output, name) for name in questions(data)}
    sources["snli"] = entailed(data)
    sources["banking77"] = classes(data / "cls-banking77" / "train.jsonl", pick)
    all_batches = []
    for name, count in ROWS.items():
        pick.shuffle(sources[name])
        found = batches(sources[name], count, size)
        print(f"{name}: {len(found) * size} rows of {len(sources[name])}")
        all_batches += [[{"query": q, "positive": p, "negatives": n[:NEGATIVES], "source": name} for q, p, n in batch]
                        for batch in found]
    pick.shuffle(all_batches)
    write(output / "train.jsonl", [row for batch in all_batches for row in batch])
    for language in ("en", "de"):
        write_retrieval(pairs(data / "qa-xquad" / f"pairs.{language}.jsonl"), output / f"xquad-{language}")


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("stage", choices=["pairs", "rows"])
    cli.add_argument("--data", type=Path, required=True)
    cli.add_argument("--output", type=Path, required=True)
    cli.add_argument("--batch", type=int, default=64)
    cli.add_argument("--seed", type=int, default=42)
    args = cli.parse_args()
    pick = random.Random(args.seed)
    if args.stage == "pairs":
        write_pairs(args.data, args.output, pick)
    else:
        write_rows(args.data, args.output, pick, args.batch)


if __name__ == "__main__":
    main()

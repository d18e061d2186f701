#!/usr/bin/env python3
"""Writes the training mixture for a pretrained MiniLM, and XQuAD as retrieval sets, from a folder of public data.

    mixture.py --data ../shared/data --output data/mixture [--rows qa-medquad=600 …]

    OUTPUT/train.jsonl           query, positive, source; distinct queries and positives; blocks of --batch rows of one source in
                                 random order (--seed): rows of one source are harder negatives for each other
    OUTPUT/xquad-{en,de}/        BEIR folders: the distinct paragraphs are the corpus, every question a query

Trainers must use the rows in this order, so that two trainers see the same batches. The dev split of SQuAD is left out, since
XQuAD has its questions; of SciFact only the claims of the train split are used.
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

# Number of rows per source, chosen for both test sets: scientific abstracts in English, Wikipedia paragraphs in English and German.
ROWS = {
    "ir-scifact": 500,
    "qa-medquad": 600,
    "qa-covidqa": 600,
    "qa-covidqa-faq": 700,
    "qa-squad-sent": 800,
    "docs-mssql-de": 800,
}


def lines(path):
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as f:
        return [json.loads(line) for line in f]


def pairs(path, keep=lambda row: True):
    return [(row["query"], row["positive"]) for row in lines(path) if keep(row)]


def detokenize(text):
    """Approximately undoes Penn Treebank tokenisation."""
    for token, mark in [("-lrb-", "("), ("-rrb-", ")"), ("``", '"'), ("''", '"')]:
        text = text.replace(token, mark)
    text = re.sub(r" ([,.;:?!%)]|'s\b|n't\b)", r"\1", text)
    return text.replace("( ", "(")


def scifact(folder):
    """Returns claims of the train split, each with its first cited abstract."""
    queries = {row["_id"]: row["text"] for row in lines(folder / "queries.jsonl")}
    corpus = {row["_id"]: f"{row['title']} {row['text']}" for row in lines(folder / "corpus.jsonl")}
    judged = {}
    for line in (folder / "qrels" / "train.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        if int(score) > 0:
            judged.setdefault(query, document)
    return [(queries[q], corpus[d]) for q, d in judged.items()]


def sources(data):
    return {
        "ir-scifact": scifact(data / "ir-scifact"),
        "qa-medquad": pairs(data / "qa-medquad" / "pairs.jsonl.gz"),
        "qa-covidqa": pairs(data / "qa-covidqa" / "pairs.jsonl"),
        "qa-covidqa-faq": pairs(data / "qa-covidqa" / "faq.pairs.jsonl", lambda row: row["lang"] in ("de", "en")),
        "qa-squad-sent": [(detokenize(q), detokenize(p)) for q, p in
                          pairs(data / "qa-squad-sent" / "pairs.jsonl.gz", lambda row: row["split"] != "dev")],
        "docs-mssql-de": pairs(data / "docs-mssql-de" / "pairs.de.jsonl.gz", lambda row: len(row["positive"]) > 200),
    }


def mixture(data, counts, batch, seed):
    pick = random.Random(seed)
    seen, batches = set(), []
    for source, found in sources(data).items():
        pick.shuffle(found)
        rows = []
        for query, positive in found:
            if len(rows) == counts[source]:
                break
            if query in seen or positive in seen:
                continue
            seen.update((query, positive))
            rows.append({"query": query, "positive": positive, "source": source})
        # Incomplete batches are left out: they would shift all later batches.
        batches += [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]
    pick.shuffle(batches)
    return [row for rows in batches for row in rows]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_retrieval(found, folder):
    """Writes pairs as a BEIR folder: distinct positives are the corpus."""
    ids = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(p for _, p in found))}
    write(folder / "corpus.jsonl", [{"_id": i, "title": "", "text": text} for text, i in ids.items()])
    write(folder / "queries.jsonl", [{"_id": f"q{i}", "text": query} for i, (query, _) in enumerate(found)])
    judged = [f"q{i}\t{ids[positive]}\t1\n" for i, (_, positive) in enumerate(found)]
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=[], metavar="SOURCE=COUNT", help=f"default: {ROWS}")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    counts = ROWS | {name: int(count) for name, count in (item.split("=") for item in args.rows)}
    if unknown := counts.keys() - ROWS.keys():
        parser.error(f"unknown source {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    rows = mixture(args.data, counts, args.batch, args.seed)
    write(args.output / "train.jsonl", rows)
    for language in ("en", "de"):
        write_retrieval(pairs(args.data / "qa-xquad" / f"pairs.{language}.jsonl"), args.output / f"xquad-{language}")
    print(json.dumps({name: sum(row["source"] == name for row in rows) for name in counts} | {"rows": len(rows)}))


if __name__ == "__main__":
    main()

"""Reads rows of public data sets in several formats, and writes the files that the trainer reads.

A source is a file (.jsonl, .json, .csv, .tsv, .parquet; all but .parquet also with .gz), or a data set on the Hugging Face hub:
ORG/NAME or ORG/NAME:CONFIG for its `train` split, ORG/NAME:CONFIG:SPLIT for another. Parquet and the hub need
`pip install datasets`.
"""

import argparse
import csv
import gzip
import json
import sys
import unicodedata
from collections import Counter
from pathlib import Path

csv.field_size_limit(1 << 30)


def rows(source):
    """Yields one dict per row. A JSON file is a list of objects, or has the format of SQuAD."""
    path = Path(source)
    if not path.exists():
        yield from hub(source)
        return
    name = path.name.removesuffix(".gz").lower()
    if name.endswith(".parquet"):
        yield from library().load_dataset("parquet", data_files=str(path), split="train")
        return
    opened = gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else open(path, encoding="utf-8")
    with opened as file:
        if name.endswith((".jsonl", ".ndjson")):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parsed(path, number, line)
        elif name.endswith(".json"):
            whole = parsed(path, 1, file.read())
            yield from squad(whole["data"]) if isinstance(whole, dict) and "data" in whole else whole
        elif name.endswith((".csv", ".tsv")):
            yield from csv.DictReader(file, delimiter="\t" if name.endswith(".tsv") else ",")
        else:
            sys.exit(f"{path}: expected .jsonl, .json, .csv, .tsv (also .gz) or .parquet")


def parsed(path, line, text):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        sys.exit(f"{path}, line {line + error.lineno - 1}: {error.msg}")


def squad(articles):
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"title": article.get("title", ""), "context": paragraph["context"], "question": question["question"]}


def hub(source):
    org_and_name, config, split, *more = (*source.split(":"), "", "")
    if org_and_name.count("/") != 1 or source.endswith((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")) or any(more):
        sys.exit(f"{source}: neither a file nor ORG/NAME, ORG/NAME:CONFIG or ORG/NAME:CONFIG:SPLIT on the hub")
    yield from library().load_dataset(org_and_name, config or None, split=split or "train")


def library():
    try:
        import datasets
    except ModuleNotFoundError:
        sys.exit("Parquet files and the hub need the library `datasets`: pip install datasets")
    return datasets


def column(row, names, source):
    """Returns the value of the first of these columns that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    sys.exit(f"{source}: a row has none of {', '.join(names)}; it has {', '.join(map(str, row))}")


def squeezed(text):
    """Normalises a text to one line with single spaces, so that copies in several data sets are equal."""
    return " ".join(unicodedata.normalize("NFC", str(text)).split())


def joined(title, text):
    return squeezed(f"{title or ''} {text or ''}")


class Writer:
    """Writes rows, except duplicates and unwanted ones, and counts the skipped rows by reason."""

    def __init__(self, path, without=()):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed at the end, so that an interrupted run leaves no incomplete data set.
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.file = open(self.partial, "w", encoding="utf-8")
        self.unwanted = {key(text) for file in without for row in rows(file) for text in strings(row)}
        self.seen = set()
        self.counts = Counter()

    def row(self, **fields):
        texts = list(strings(fields))
        if not all(text.strip() for text in texts) or [] in fields.values():
            self.counts["empty"] += 1
        elif any(key(text) in self.unwanted for text in texts):
            self.counts["unwanted"] += 1
        elif (same := hash(json.dumps(fields, sort_keys=True))) in self.seen:
            self.counts["double"] += 1
        else:
            self.seen.add(same)
            self.counts["rows"] += 1
            self.file.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def done(self):
        self.file.close()
        if not self.counts["rows"]:
            self.partial.unlink()
            sys.exit(f"{self.path}: no rows left; skipped {dict(self.counts)}")
        self.partial.replace(self.path)
        print(json.dumps({"file": str(self.path)} | dict(self.counts)))


def key(text):
    return squeezed(text).casefold()


def strings(value):
    """Yields all texts of a row at any depth, also with their titles; skips ids and labels."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if not name.endswith("id") and not name.startswith(("label", "categor")):
                yield from strings(part)
        if value.get("title"):
            yield joined(value["title"], value.get("text") or value.get("abstract"))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings(part)


def parser(description):
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--without", nargs="*", default=[], metavar="SOURCE",
                      help="leave out rows that have a text of these sources, such as test sets")
    return made

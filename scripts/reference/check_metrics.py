#!/usr/bin/env python3
"""Compares the metrics of `trainer evaluate` on real data with those of sentence-transformers for the same embeddings.

    check_metrics.py --model DIR --retrieval scifact cisi cranfield --triplet triplets.jsonl --similarity en.test.jsonl

`trainer encode` embeds the texts that `trainer evaluate` embeds, in the same order (documents by id); the evaluators of
sentence-transformers get these embeddings instead of a model. Retrieval: BEIR folders with qrels/test.tsv. Triplets: rows with
query, positive, negative. Similarity: rows with s1, s2, score. Prints the largest difference of each set; exit status 1 if a
metric name or a CSV heading differs, or a metric by more than --within.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    TripletEvaluator,
)
from sentence_transformers.util import cos_sim


def rows(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def length(args):
    return ["--max-length", str(args.max_length)] if args.max_length else []


class Embedded:
    """A model that returns precomputed embeddings."""

    similarity_fn_name = "cosine"
    similarity = staticmethod(cos_sim)
    model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_: None)

    def __init__(self, args):
        self.args, self.known = args, {}

    def add(self, role, texts):
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "texts.jsonl"), Path(folder, "texts.npy")
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            command = [self.args.trainer, "encode", "--quiet", *length(self.args), "--model", self.args.model,
                       "--input", source, "--output", target]
            subprocess.run([*command, *(["--role", role] if role else [])], check=True)
            self.known.update({(role, text): row for text, row in zip(texts, np.load(target))})

    def look_up(self, role, texts, convert_to_tensor=False):
        found = np.stack([self.known[role, text] for text in texts])
        return torch.from_numpy(found) if convert_to_tensor else found

    def encode(self, texts, convert_to_tensor=False, **_):
        return self.look_up(None, texts, convert_to_tensor)

    def encode_query(self, texts, convert_to_tensor=False, **_):
        return self.look_up("query", texts, convert_to_tensor)

    def encode_document(self, texts, convert_to_tensor=False, **_):
        return self.look_up("document", texts, convert_to_tensor)


def retrieval(path, model):
    relevant = {}
    for line in (path / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        if float(score) > 0:
            relevant.setdefault(query, set()).add(document)
    queries = {row["_id"]: row["text"] for row in rows(path / "queries.jsonl") if row["_id"] in relevant}
    text = lambda row: f"{row['title']} {row['text']}".strip() if row.get("title") else row["text"]
    corpus = {row["_id"]: text(row) for row in sorted(rows(path / "corpus.jsonl"), key=lambda row: row["_id"])}
    model.add("query", list(queries.values()))
    model.add("document", list(corpus.values()))
    return InformationRetrievalEvaluator(queries, corpus, relevant, name=path.name)


def triplet(path, model):
    columns = [[row[name] for row in rows(path)] for name in ("query", "positive", "negative")]
    for role, texts in zip(("query", "document", "document"), columns):
        model.add(role, texts)
    return TripletEvaluator(*columns, name=path.stem,
                            similarity_fn_names=["cosine", "dot", "manhattan", "euclidean"])


def similarity(path, model):
    first, second, scores = ([row[name] for row in rows(path)] for name in ("s1", "s2", "score"))
    model.add(None, first)
    model.add(None, second)
    return EmbeddingSimilarityEvaluator(first, second, scores, name=path.stem)


def check(kind, path, make, args):
    model = Embedded(args)
    evaluator = make(path, model)
    with tempfile.TemporaryDirectory() as folder:
        theirs = evaluator(model, output_path=str(Path(folder, "theirs")), epoch=-1, steps=-1)
        command = [args.trainer, "evaluate", "--quiet", *length(args), "--model", args.model, "--set", path,
                   "--kind", kind, "--output", Path(folder, "ours")]
        ours = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        tables = [Path(folder, side, evaluator.csv_file).read_text().splitlines() for side in ("ours", "theirs")]
    same_names = list(ours) == list(theirs)
    same_headings = tables[0][0] == tables[1][0]
    worst = max(abs(ours[name] - float(theirs[name])) for name in theirs if name in ours)
    in_csv = max(abs(float(a) - float(b)) for a, b in zip(tables[0][1].split(","), tables[1][1].split(",")))
    primary = evaluator.primary_metric
    print(f"{kind:10} {primary} {ours[primary]:.6f} here, {float(theirs[primary]):.6f} there; {len(theirs)} metrics differ by "
          f"{worst:.1e} at most, the CSV by {in_csv:.1e}; names {'equal' if same_names else 'DIFFER'}, "
          f"headings {'equal' if same_headings else 'DIFFER'}", flush=True)
    return same_names and same_headings and worst <= args.within and in_csv <= args.within


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trainer", default="target/debug/trainer")
    p.add_argument("--model", required=True)
    p.add_argument("--retrieval", type=Path, nargs="*", default=[])
    p.add_argument("--triplet", type=Path, nargs="*", default=[])
    p.add_argument("--similarity", type=Path, nargs="*", default=[])
    p.add_argument("--max-length", type=int, help="maximum number of tokens on both sides; default: that of the model")
    p.add_argument("--within", type=float, default=1e-6)
    args = p.parse_args()
    jobs = [("retrieval", retrieval, args.retrieval), ("triplet", triplet, args.triplet),
            ("similarity", similarity, args.similarity)]
    passed = [check(kind, path, make, args) for kind, make, paths in jobs for path in paths]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()

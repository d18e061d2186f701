#!/usr/bin/env python3
"""Writes tests/golden/metrics.json: the results of the evaluators of sentence-transformers for small random embeddings with ties.

Run: python scripts/reference/metrics.py     (needs scripts/requirements-reference.txt; reruns are bit-equal)
"""

import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    NanoBEIREvaluator,
    TripletEvaluator,
)
from sentence_transformers.util import cos_sim

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "metrics.json"
WIDTH = 16


class Lookup:
    """A model for which a text is the number of its row."""

    similarity_fn_name = "cosine"
    similarity = staticmethod(cos_sim)
    model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_: None)

    def __init__(self, rows):
        self.rows = np.array(rows, dtype=np.float32)

    def encode(self, texts, convert_to_tensor=False, **_):
        rows = self.rows[[int(text) for text in texts]]
        return torch.from_numpy(rows) if convert_to_tensor else rows

    encode_query = encode_document = encode


def rows(count, seed):
    """Draws embeddings whose lengths are powers of two, so that similarities are exact for any order of sums, and often equal."""
    pick = random.Random(seed)
    found = []
    for _ in range(count):
        places = pick.sample(range(WIDTH), pick.choice([1, 4, 4, 16, 16]))
        length = pick.choice([0.25, 1.0, 8.0])
        found.append([pick.choice([-length, length]) if i in places else 0.0 for i in range(WIDTH)])
    return found


def run(evaluator, embeddings):
    """Returns the scores and the CSV of an evaluator."""
    with tempfile.TemporaryDirectory() as folder:
        scores = evaluator(Lookup(embeddings), output_path=folder, epoch=1, steps=20)
        (csv,) = Path(folder).iterdir()
        return {"scores": scores, "primary": evaluator.primary_metric, "csv_name": csv.name,
                "csv_header": csv.read_text().splitlines()[0]}


def embedded(name, queries, documents, seed):
    """Returns a collection, its evaluator, and the embeddings of its texts."""
    pick = random.Random(seed)
    # Ids are ordered as strings: d10 before d9.
    ids = [f"d{i}" for i in range(documents)]
    pick.shuffle(ids)
    embeddings = rows(queries + documents, seed)
    scores = cos_sim(embeddings[:queries], embeddings[queries:]).tolist()
    relevant = {}
    for i, row in enumerate(scores):
        # Some of the best documents, so that metrics are above 0, and some random ones.
        best = sorted(ids, key=lambda id: -row[ids.index(id)])[: documents // 6]
        count = pick.choice([0, 1, 1, 2, 3, 12])
        relevant[f"q{i}"] = sorted({pick.choice(pick.choice([best, best, ids])) for _ in range(count)})
    evaluator = InformationRetrievalEvaluator(
        queries={f"q{i}": str(i) for i in range(queries)},
        corpus={id: str(queries + i) for i, id in enumerate(ids)},
        relevant_docs={query: set(documents) for query, documents in relevant.items()},
        corpus_chunk_size=50, name=name)
    return {"name": name, "queries": embeddings[:queries], "documents": embeddings[queries:], "ids": ids,
            "relevant": relevant}, evaluator, embeddings


def retrieval(*collection, seed):
    golden, evaluator, embeddings = embedded(*collection, seed)
    return {**golden, **run(evaluator, embeddings)}


class Nano(NanoBEIREvaluator):
    """Runs the evaluator on collections in memory."""

    def __init__(self, evaluators):
        self.given = evaluators
        super().__init__(dataset_names=list(evaluators))

    def _validate_dataset_names(self):
        pass

    def _load_dataset(self, name, **_):
        return self.given[name]


def nano():
    """Renames the collections of `retrieval`. Each evaluator has its own model, since the texts of several are equal."""
    sets = [embedded("NanoFirst", 23, 257, 1), embedded("NanoSecond", 3, 13, 4)]

    class Own:
        def __init__(self, evaluator, rows):
            self.evaluator, self.rows, self.name = evaluator, rows, evaluator.name

        def __call__(self, _, *args):
            return self.evaluator(Lookup(self.rows), *args)

        def __getattr__(self, name):
            return getattr(self.evaluator, name)

    evaluator = Nano({golden["name"]: Own(evaluator, rows) for golden, evaluator, rows in sets})
    with tempfile.TemporaryDirectory() as folder:
        scores = evaluator(Lookup([[0.0] * WIDTH]), output_path=folder)
        path = Path(folder, evaluator.csv_file)
        header = path.read_text().splitlines()[0]
    return {"sets": [golden["name"] for golden, *_ in sets], "scores": scores, "primary": evaluator.primary_metric,
            "csv_name": evaluator.csv_file, "csv_header": header}


def triplets(count, seed):
    embeddings = rows(3 * count, seed)
    texts = [str(i) for i in range(3 * count)]
    evaluator = TripletEvaluator(
        texts[:count], texts[count:2 * count], texts[2 * count:], name="nli",
        similarity_fn_names=["cosine", "dot", "manhattan", "euclidean"])
    return {"name": "nli", "anchors": embeddings[:count], "positives": embeddings[count:2 * count],
            "negatives": embeddings[2 * count:], **run(evaluator, embeddings)}


def similarity(count, seed):
    pick = random.Random(seed)
    embeddings = rows(2 * count, seed)
    gold = [pick.choice([0.0, 1.5, 2.0, 3.25, 5.0]) for _ in range(count)]
    texts = [str(i) for i in range(2 * count)]
    evaluator = EmbeddingSimilarityEvaluator(texts[:count], texts[count:], gold, name="sts")
    return {"name": "sts", "first": embeddings[:count], "second": embeddings[count:], "gold": gold,
            **run(evaluator, embeddings)}


def folder():
    """Evaluates rows with the tiny model of bert.py."""
    rows = [json.loads(line) for line in (GOLDEN.parent / "bert" / "rows.jsonl").open()]
    column = {name: [row[name] for row in rows] for name in rows[0]}
    model = SentenceTransformer(str(GOLDEN.parent / "bert"), device="cpu")
    queries = {f"q{i}": text for i, text in enumerate(column["query"])}
    corpus = {f"d{i:04}": text for i, text in enumerate(column["positive"])}
    pairs = InformationRetrievalEvaluator(
        queries, corpus, {f"q{i}": {f"d{i:04}"} for i in range(len(rows))}, name="rows")
    negatives = [row["negatives"][0] for row in rows]
    triplets = TripletEvaluator(
        column["query"], column["positive"], negatives, name="rows",
        similarity_fn_names=["cosine", "dot", "manhattan", "euclidean"])
    return {"retrieval": pairs(model), "triplet": triplets(model)}


def main():
    golden = {
        "folder": folder(),
        # More documents than the longest ranking (100), and fewer.
        "retrieval": [retrieval("many", 23, 257, seed=1), retrieval("few", 3, 13, seed=4)],
        "triplet": triplets(41, seed=2),
        "similarity": similarity(37, seed=3),
        "nano": nano(),
    }
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()

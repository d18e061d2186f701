#!/usr/bin/env python3
"""Writes tests/golden/mining.json: the hard negatives of mine_hard_negatives in sentence-transformers.

`cases` have synthetic embeddings (integers, which both sides scale to length 1) and cover every parameter; `folder` has the rows
of tests/golden/bert, mined with that model. Queries whose results depend on rounding are left out.

Run: python scripts/reference/mining.py     (needs scripts/requirements-reference.txt and datasets; reruns are bit-equal)
"""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim, mine_hard_negatives, pairwise_cos_sim

TESTS = Path(__file__).resolve().parents[2] / "tests" / "golden"
WIDTH = 16
# Minimum difference of two scores, or of a score and a limit: larger than rounding errors.
APART = 2e-6


class Lookup:
    """A model that looks up the embedding of a text."""

    device = "cpu"
    similarity = staticmethod(cos_sim)
    similarity_pairwise = staticmethod(pairwise_cos_sim)
    model_card_data = SimpleNamespace(base_model="lookup")

    def __init__(self, rows):
        self.rows = rows

    def encode(self, texts, **_):
        rows = np.array([self.rows[text] for text in texts], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    encode_query = encode_document = encode


def world(seed):
    """Returns pairs and a corpus: queries with one to three positives, repeated pairs, positives that are in the corpus."""
    pick = random.Random(seed)
    draw = lambda: [pick.gauss(0, 40) for _ in range(WIDTH)]
    rows, pairs = {}, []
    for q in range(40):
        query = draw()
        rows[f"q{q}"] = query
        for p in range(pick.choice([1, 1, 1, 2, 3])):
            noise = pick.choice([0.3, 0.8, 1.5])
            rows[f"p{q}.{p}"] = [x + noise * n for x, n in zip(query, draw())]
            pairs += [(f"q{q}", f"p{q}.{p}")] * pick.choice([1, 1, 1, 2])
    pick.shuffle(pairs)
    corpus = []
    for d in range(120):
        near = rows[f"q{pick.randrange(40)}"]
        rows[f"d{d}"] = [x + pick.choice([0.5, 1, 3]) * n for x, n in zip(near, draw())]
        corpus.append(f"d{d}")
    corpus += [pairs[3][1], "d5", pairs[0][1]]
    return {text: [round(x) for x in row] for text, row in rows.items()}, pairs, corpus


def mined(pairs, model, corpus, **settings):
    """Returns rows [query, positive, negatives, scores] that do not depend on rounding."""
    dataset = Dataset.from_dict({"query": [q for q, _ in pairs], "positive": [p for _, p in pairs]})
    # The only format that keeps the order of positives.
    whole = settings.get("include_positives", False)
    found = mine_hard_negatives(dataset, model, corpus=corpus, output_format="n-tuple" if whole else "labeled-list",
                                output_scores=True, verbose=False, **settings)
    random.seed(1)
    texts = lambda row: [row["positive"]] + [row[name] for name in row if name.startswith("negative_")] if whole else row["positive"]
    return [[row["query"], texts(row)[0], texts(row)[1:], [round(score, 7) for score in row["scores"]]] for row in found]


def settled(pairs, model, corpora, cases):
    """Selects the pairs of queries whose scores differ from each other and from limits by more than rounding errors."""
    limits_of = lambda settings, lowest: [
        settings.get("max_score"),
        settings.get("min_score"),
        lowest - settings["absolute_margin"] if "absolute_margin" in settings else None,
        lowest - abs(lowest) * settings["relative_margin"] if "relative_margin" in settings else None,
    ]
    unsettled = set()
    for corpus in corpora:
        documents = list(dict.fromkeys((corpus or []) + [p for _, p in pairs]))
        queries = list(dict.fromkeys(q for q, _ in pairs))
        scores = cos_sim(model.encode_query(queries, normalize_embeddings=True),
                         model.encode_document(documents, normalize_embeddings=True)).double()
        for query, row in zip(queries, scores):
            lowest = min(row[documents.index(p)] for q, p in pairs if q == query)
            others = torch.stack([s for s, d in zip(row, documents) if (query, d) not in pairs])
            ranked = lambda settings: row if settings.get("include_positives") else others
            limits = [(ranked(settings), limit) for settings in cases for limit in limits_of(settings, lowest) if limit is not None]
            gaps = [row.sort().values.diff().min()] + [(scores - limit).abs().min() for scores, limit in limits]
            if min(gaps) <= APART:
                unsettled.add(query)
    return [(q, p) for q, p in pairs if q not in unsettled]


CASES = [
    dict(),
    dict(num_negatives=1),
    dict(num_negatives=7, range_min=4),
    dict(num_negatives=5, range_max=9),
    dict(num_negatives=2, range_min=3, range_max=8),
    dict(num_negatives=4, max_score=0.4),
    dict(num_negatives=4, min_score=0.45),
    dict(num_negatives=4, absolute_margin=0.2),
    dict(num_negatives=4, absolute_margin=-0.1),
    dict(num_negatives=5, relative_margin=0.05),
    dict(num_negatives=3, relative_margin=0.6),
    dict(num_negatives=3, absolute_margin=0.1, relative_margin=0.3, max_score=0.6, min_score=0.2, range_min=2, range_max=30),
    dict(num_negatives=60, relative_margin=0.05),
    dict(num_negatives=6, include_positives=True),
    dict(num_negatives=3, include_positives=True, max_score=0.8, range_min=1, range_max=20),
    dict(num_negatives=3, sampling_strategy="random", range_min=2, range_max=12, relative_margin=0.1),
]


def main():
    rows, pairs, corpus = world(5)
    model, cases = Lookup(rows), []
    pairs = settled(pairs, model, [corpus, None], CASES)
    for number, settings in enumerate(CASES):
        for searched in [corpus] if number % 3 else [corpus, None]:
            case = {"settings": settings, "corpus": searched is not None}
            if settings.get("sampling_strategy") == "random":
                # Random numbers differ, so the candidates of the draw are compared.
                whole = settings | {"sampling_strategy": "top", "num_negatives": settings["range_max"] - settings["range_min"]}
                case["rows"] = mined(pairs, model, searched, **whole)
                drawn = mined(pairs, model, searched, **settings)
                assert all(set(some[2]) <= set(all_[2]) for some, all_ in zip(drawn, case["rows"], strict=True))
            else:
                case["rows"] = mined(pairs, model, searched, **settings)
            cases.append(case)

    bert = SentenceTransformer(str(TESTS / "bert"), device="cpu")
    texts = [json.loads(line) for line in (TESTS / "bert" / "rows.jsonl").read_text().splitlines()]
    folder_pairs = [(row["query"], row["positive"]) for row in texts]
    negatives = [row[name] for row in texts for name in row if name.startswith("neg")]
    negatives = [text for item in negatives for text in (item if isinstance(item, list) else [item])]
    folder, both = [], [
        dict(num_negatives=5, relative_margin=0.002),
        dict(num_negatives=3, absolute_margin=0.001, max_score=0.995, range_min=1, range_max=20),
        dict(num_negatives=4, include_positives=True),
    ]
    folder_pairs = settled(folder_pairs, bert, [negatives], both)
    for settings in both:
        folder.append({"settings": settings, "rows": mined(folder_pairs, bert, negatives, **settings)})
    golden = {"embeddings": rows, "pairs": pairs, "corpus": corpus, "cases": cases,
              "folder": {"pairs": folder_pairs, "corpus": negatives, "cases": folder}}
    (TESTS / "mining.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(len(pairs), len(folder_pairs), [len(case["rows"]) for case in cases + folder])


if __name__ == "__main__":
    main()

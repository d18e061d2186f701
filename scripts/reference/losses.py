#!/usr/bin/env python3
"""Writes tests/golden/losses.json: the losses of sentence-transformers for small random embeddings, and their gradients.

Run: python scripts/reference/losses.py     (needs scripts/requirements-reference.txt; reruns are bit-equal)

Every case has the embeddings of each column (query, positive, negatives; in float64), labels, loss and d(loss)/d(embeddings).
"""

import json
from pathlib import Path

import torch
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric
from sentence_transformers.util import dot_score

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "losses.json"
ROWS, WIDTH = 6, 8


class Lookup(torch.nn.Module):
    """A model whose features are the embeddings."""

    def forward(self, features):
        return {"sentence_embedding": features["embeddings"]}

    def get_embedding_dimension(self):
        return WIDTH


def case(name, loss, columns, labels=None, unit=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(columns)]
    if unit:
        columns = [torch.nn.functional.normalize(column) for column in columns]
    columns = [column.requires_grad_() for column in columns]
    value = loss([{"embeddings": column} for column in columns], labels)
    value.backward()
    return {
        "name": name,
        "columns": [column.tolist() for column in columns],
        "labels": None if labels is None else labels.tolist(),
        "loss": value.item(),
        "gradients": [column.grad.tolist() for column in columns],
    }


def main():
    torch.set_num_threads(1)
    model = Lookup()
    generator = torch.Generator().manual_seed(99)
    scores = torch.tensor([0.0, 5.0, 2.5, 2.5, 1.0, 4.2], dtype=torch.float64)
    teacher = 3 * torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    cases = [
        # The embeddings already have length 1; the gradient through the normalisation does not belong to the loss.
        case("info_nce", losses.MultipleNegativesRankingLoss(model, scale=20.0, similarity_fct=dot_score), 3, unit=True),
        case("info_nce any length", losses.MultipleNegativesRankingLoss(model, scale=20.0), 3),
        case("cosent", losses.CoSENTLoss(model, scale=20.0), 2, scores),
        case("margin_mse", losses.MarginMSELoss(model), 4, teacher, unit=True),
        case("margin_mse one", losses.MarginMSELoss(model), 3, teacher[:, 0]),
        case("margin_mse scores", losses.MarginMSELoss(model), 3, teacher[:, :2]),
        case("kl", losses.DistillKLDivLoss(model, temperature=1.0), 4, teacher),
        case("kl temperatures", losses.DistillKLDivLoss(model, student_temperature=0.25, teacher_temperature=2.0), 4,
             teacher, unit=True),
    ]
    for distance in ("COSINE", "EUCLIDEAN", "MANHATTAN"):
        loss = losses.TripletLoss(model, getattr(TripletDistanceMetric, distance), triplet_margin=0.75)
        cases.append(case(f"triplet {distance.lower()}", loss, 3))
    for name, inner, columns, labels in [
        ("info_nce", losses.MultipleNegativesRankingLoss(model, scale=20.0), 3, None),
        ("cosent", losses.CoSENTLoss(model, scale=20.0), 2, scores),
        ("kl", losses.DistillKLDivLoss(model, temperature=1.0), 4, teacher),
    ]:
        loss = losses.MatryoshkaLoss(model, inner, [WIDTH, 4, 3], [1.0, 0.5, 0.25])
        cases.append(case(f"matryoshka {name}", loss, columns, labels))
    GOLDEN.write_text(json.dumps(cases) + "\n")
    print("\n".join(f"{case['name']:24} {case['loss']:.6f}" for case in cases))


if __name__ == "__main__":
    main()

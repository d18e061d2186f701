#!/usr/bin/env python3
"""Writes tests/golden/minilm.json: results of sentence-transformers with all-MiniLM-L6-v2 on real questions.

    minilm.py --model MINILM --rows qa-medquad/pairs.jsonl.gz --output tests/golden/minilm.json

The file has embeddings of the texts below, and for the first batches of rows the InfoNCE loss and the norm of its gradient over
all parameters, without training in between. It does not have the rows themselves.
"""

import argparse
import gzip
import itertools
import json
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

TEXTS = [
    "How tall is the Matterhorn?",
    "Das Matterhorn ist 4478 Meter hoch.",
    "x",
    "naïve café, 東京 🙂 — and a_very-long/identifier(42)",
    "one two three four five six seven eight nine ten " * 40,
]
BATCH, BATCHES, LENGTH, TEMPERATURE, KEPT = 8, 2, 64, 0.05, 12


def rounded(values, digits=7):
    return [round(float(value), digits) for value in values]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--rows", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True)
    args = p.parse_args()
    model = SentenceTransformer(args.model, device="cpu").eval()
    embeddings = model.encode(TEXTS, normalize_embeddings=True)
    model.max_seq_length = LENGTH
    with gzip.open(args.rows, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in itertools.islice(f, BATCH * BATCHES)]
    steps = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        q, d = (torch.nn.functional.normalize(model(model.tokenize([row[side] for row in batch]))["sentence_embedding"])
                for side in ("query", "positive"))
        loss = torch.nn.functional.cross_entropy(q @ d.T / TEMPERATURE, torch.arange(len(batch)))
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.double().pow(2).sum() for gradient in gradients]).sum().sqrt()
        steps.append({"loss": loss.item(), "grad_norm": norm.item()})
    golden = {"texts": TEXTS, "first_dims": [rounded(row[:KEPT]) for row in embeddings],
              "batch_size": BATCH, "max_length": LENGTH, "temperature": TEMPERATURE, "steps": steps}
    args.output.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()

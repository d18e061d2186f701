#!/usr/bin/env python3
"""Trains every model family of tests/golden for a few steps and opens the exported models in Python.

    check_families.py [--trainer target/release/trainer] [--families bert mistral …]

For each family, sentence-transformers opens the base model, the fully trained one, the adapter and the merged adapter, and embeds
texts; the embeddings must equal those of `trainer encode`. PEFT continues an adapter after five steps; its loss on the next batch
must equal that of the sixth step here. Exit status 1 if a cosine similarity is below 0.9999 or losses differ by more than 1e-4.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import GOLDEN, TEXTS

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer, losses

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, TEMPERATURE, LENGTH = 4, 5, 0.05, 24


def trainer(args, *command):
    done = subprocess.run([args.trainer, "--quiet", *map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"`{' '.join(map(str, command))}` failed with status {done.returncode}: {done.stderr}")


def train(args, family, output, lora, steps=STEPS):
    config = {
        "output": str(output),
        "model": {"path": str(GOLDEN / family), "dropout": 0.0, "max_query_length": LENGTH, "max_document_length": LENGTH},
        "data": {"train": [{"path": str(GOLDEN / "bert" / "rows.jsonl")}], "negatives": 1, "shuffle": False,
                 "no_duplicates": False},
        "loss": {"temperature": TEMPERATURE, "mask_known_positives": False},
        "training": {"batch_size": BATCH, "learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0,
                     "max_steps": steps},
        "logging": {"tensorboard": False},
    } | ({"lora": {"rank": 4, "alpha": 8}} if lora else {})
    path = output.with_suffix(".json")
    path.write_text(json.dumps(config))
    trainer(args, "train", path)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def least_cosine(args, folder, scratch):
    """Returns the minimum cosine similarity between embeddings of `trainer encode` and sentence-transformers."""
    texts = [text for text in TEXTS if text]
    (scratch / "texts.txt").write_text("\n".join(texts) + "\n")
    trainer(args, "encode", "--model", folder, "--input", scratch / "texts.txt", "--output", scratch / "x.npy")
    ours = np.load(scratch / "x.npy").astype(np.float64)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}).eval()
    theirs = model.encode(texts, show_progress_bar=False).astype(np.float64)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return float(cosine.min())


def next_loss_in_peft(family, adapter):
    """Returns the loss of the batch after STEPS batches, with the adapter on its base."""
    model = SentenceTransformer(str(GOLDEN / family), device="cpu",
                                model_kwargs={"dtype": torch.float32, "attn_implementation": "eager"})
    PeftModel.from_pretrained(model[0].auto_model, str(adapter), is_trainable=True)
    model.eval()
    model.max_seq_length = LENGTH
    lines = (GOLDEN / "bert" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[BATCH * STEPS:BATCH * (STEPS + 1)]]
    columns = [[row["query"] for row in rows], [row["positive"] for row in rows],
               [row["negatives"][0] for row in rows]]
    loss = losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    return loss([model.preprocess(column) for column in columns], None).item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trainer", type=Path, default=ROOT / "target" / "release" / "trainer")
    p.add_argument("--families", nargs="+", default=sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
    args = p.parse_args()
    missed = []
    print(f"{'family':12} {'as it is':>11} {'trained':>11} {'adapter':>11} {'merged':>11} {'next loss':>10} {'in PEFT':>10}")
    for family in args.families:
        with tempfile.TemporaryDirectory() as place:
            scratch = Path(place)
            train(args, family, scratch / "whole", lora=False)
            train(args, family, scratch / "lora", lora=True)
            trainer(args, "export", "--run", scratch / "lora", "--output", scratch / "merged", "--merge")
            folders = [GOLDEN / family, scratch / "whole" / "model", scratch / "lora" / "model", scratch / "merged"]
            cosines = [least_cosine(args, folder, scratch) for folder in folders]
            ours = train(args, family, scratch / "further", lora=True, steps=STEPS + 1)[-1]
            theirs = next_loss_in_peft(family, scratch / "lora" / "model")
        print(f"{family:12} " + " ".join(f"{c:11.8f}" for c in cosines) + f" {ours:10.6f} {theirs:10.6f}", flush=True)
        # `not >=` instead of `<`, so that NaN fails.
        if not min(cosines) > 0.9999 or not abs(ours - theirs) < 1e-4:
            missed.append(family)
    if missed:
        sys.exit("different results: " + ", ".join(missed))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Opens an exported model in Python and compares its embeddings with those of `trainer encode`.

    trainer encode --model runs/x/model --input texts.txt --output texts.npy
    check_export.py --model runs/x/model --texts texts.txt --embeddings texts.npy
    check_export.py --model BASE --adapter runs/x/model --texts texts.txt --embeddings texts.npy     by PEFT: base + adapter

--texts is .jsonl with "text", or has one text per line, as for `trainer encode`. Without --adapter, sentence-transformers opens
the folder: a whole model, a merged one, or an adapter that names its base. With --adapter, sentence-transformers opens the base
and PEFT adds the adapter. Prints the minimum and the mean cosine similarity; exit status 1 if the minimum is below --least.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from sentence_transformers import SentenceTransformer


def read_texts(path):
    with open(path, encoding="utf-8") as f:
        lines = f.read().splitlines()
    return [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines


def open_model(args):
    model = SentenceTransformer(str(args.model), device="cpu", model_kwargs={"dtype": torch.float32})
    if args.adapter:
        from peft import PeftModel

        # PEFT injects the adapter into the layers of the model. It only warns about unknown names; here they are an error.
        loaded = PeftModel.from_pretrained(model[0].auto_model, str(args.adapter))
        from safetensors import safe_open

        with safe_open(args.adapter / "adapter_model.safetensors", "pt") as file:
            written = set(file.keys())
        known = {name.replace(".default.", ".") for name, _ in loaded.named_parameters()}
        if unknown := sorted(written - known):
            sys.exit(f"PEFT does not know `{unknown[0]}` and {len(unknown) - 1} more tensors of {args.adapter}")
    if args.max_length:
        model.max_seq_length = args.max_length
    return model.eval()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--adapter", type=Path)
    p.add_argument("--texts", type=Path, required=True)
    p.add_argument("--embeddings", type=Path, required=True, help=".npy of (texts, width), f32")
    p.add_argument("--prompt", default="", help="prompt that `trainer encode` used")
    p.add_argument("--max-length", type=int, default=0, help="default: that of the folder")
    p.add_argument("--least", type=float, default=0.9999)
    args = p.parse_args()

    texts, written = read_texts(args.texts), np.load(args.embeddings)
    here = open_model(args).encode(texts, prompt=args.prompt or None, show_progress_bar=False).astype(np.float64)
    if written.shape != here.shape:
        sys.exit(f"`{args.embeddings}` has shape {written.shape}, sentence-transformers returns {here.shape}")
    written = written.astype(np.float64)
    cosine = (written * here).sum(1) / np.linalg.norm(written, axis=1) / np.linalg.norm(here, axis=1)
    print(f"{len(texts)} texts: minimum cosine {cosine.min():.8f}, mean {cosine.mean():.8f}, "
          f"greatest |difference| {np.abs(written - here).max():.2e}")
    # `not >=` instead of `<`, so that NaN fails.
    if not cosine.min() >= args.least:
        sys.exit(f"text {int(np.nanargmin(cosine))} is below {args.least}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes model folders with random weights in the shapes of real models, for measuring speed and memory.

    shapes.py --tokenizer MINILM --output FOLDER [--shapes bert mpnet modernbert mistral large]

--tokenizer is a model folder with a WordPiece tokenizer. Layers have the base size, but there are few, so that a comparison takes
seconds; `large` is a Mistral of 1.1 G parameters in shards of 2 GB.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

WIDE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 3, "initializer_range": 0.02}
PLAIN = WIDE | {"intermediate_size": 3072, "max_position_embeddings": 514}
MISTRAL = {"hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
           "intermediate_size": 3584, "max_position_embeddings": 4096, "sliding_window": 4096, "rms_norm_eps": 1e-5}
SHAPES = {
    "bert": ("bert", "BertModel", "mean_tokens", PLAIN | {"max_position_embeddings": 512}),
    "mpnet": ("mpnet", "MPNetModel", "mean_tokens", PLAIN | {"pad_token_id": 1}),
    "modernbert": ("modernbert", "ModernBertModel", "mean_tokens",
                   WIDE | {"intermediate_size": 1152, "num_hidden_layers": 4, "max_position_embeddings": 8192, "pad_token_id": 0, "cls_token_id": 101,
                           "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}),
    "mistral": ("mistral", "MistralModel", "lasttoken", MISTRAL),
    "large": ("mistral", "MistralModel", "lasttoken",
              MISTRAL | {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 16, "num_key_value_heads": 4,
                         "intermediate_size": 5632}),
}


def write(folder, tokenizer, name):
    kind, architecture, pooling, more = SHAPES[name]
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, **more)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture], "vocab_size": vocabulary}
                                                   | more))
    # The initialisation of transformers takes minutes for a large model.
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in getattr(transformers, architecture)(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shard, size, shards = {}, 0, []
    for name, shape in shapes.items():
        deviation = 0.02 * 3 ** 0.5
        shard[name] = torch.ones(shape) if len(shape) == 1 and name.endswith("weight") else torch.empty(shape).uniform_(
            -deviation, deviation, generator=generator)
        size += shard[name].numel() * 4
        if size > 2e9 or name == list(shapes)[-1]:
            shards.append(list(shard))
            save_file(shard, folder / f"part-{len(shards)}")
            shard, size = {}, 0
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for i, name in enumerate(names, start=1):
        (folder / f"part-{i}").rename(folder / name)
    if len(names) > 1:
        index = {tensor: name for name, tensors in zip(names, shards) for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, folder)
    parts = ["Transformer", "Pooling", "Normalize"]
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": f"{i}_{part}" if i else "", "type": f"sentence_transformers.models.{part}"}
        for i, part in enumerate(parts)]))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "lasttoken")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(
        {"word_embedding_dimension": more["hidden_size"]} | {f"pooling_mode_{mode}": mode == pooling for mode in modes}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512, "do_lower_case": False}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "large"])
    args = p.parse_args()
    for name in args.shapes:
        write(args.output / name, args.tokenizer, name)


if __name__ == "__main__":
    main()

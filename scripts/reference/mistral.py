#!/usr/bin/env python3
"""Writes tests/golden/mistral: a tiny random Mistral, last-token pooling, and the results of transformers and PEFT with it.

The sliding window of 5 is shorter than most texts, two query heads share a key head, and the tokenizer falls back to bytes and
appends the end token, as that of e5-mistral does.

Run: python scripts/reference/mistral.py     (needs scripts/requirements-reference.txt; reruns are bit-equal)
"""

import string

from common import GOLDEN, randomise, write_adapter, write_folder, write_golden, write_training
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import MistralConfig, MistralModel

FOLDER = GOLDEN / "mistral"
MAX_LENGTH = 64
CONFIG = {
    "architectures": ["MistralModel"], "model_type": "mistral", "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64,
    "max_position_embeddings": MAX_LENGTH, "sliding_window": 5, "rope_theta": 10000.0, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False,
    "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}


def tokenizer():
    """A BPE tokenizer as converted from sentencepiece: U+2581 begins words, unknown characters become bytes."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>"])}
    for piece in [f"<0x{b:02X}>" for b in range(256)] + ["\u2581", *string.ascii_letters, *string.digits, *"?,;:.-"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "a"), ("i", "r"), ("ir", "on"), ("o", "n"),
              ("\u2581", "m"), ("e", "t"), ("et", "al"), ("a", "l"), ("\u2581m", "etal"), ("i", "s"), ("\u2581", "is")]
    merges.sort(key=lambda m: merges_depth(m, merges))
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tok = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s>:1 $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)])
    tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    return tok, len(vocabulary)


def merges_depth(merge, merges):
    """Returns the depth of a merge, which may only use tokens of earlier merges."""
    made = {left + right: (left, right) for left, right in merges}
    return 1 + max((merges_depth(made[part], merges) for part in merge if part in made), default=0)


def main():
    tok, size = tokenizer()
    config = CONFIG | {"vocab_size": size}
    model = MistralModel(MistralConfig(**config))
    randomise(model, seed=4)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, "unk_token": "<unk>",
             "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "right"}
    write_folder(FOLDER, model, config, tok, named, "lasttoken", MAX_LENGTH)
    write_adapter(FOLDER / "adapter", model, "all-linear", seed=5)
    sequences = write_golden(FOLDER, "lasttoken", single=9, max_length=MAX_LENGTH)
    write_training(FOLDER, "lasttoken", sequences, adapter=True, temperature=0.02)


if __name__ == "__main__":
    main()

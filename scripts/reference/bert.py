#!/usr/bin/env python3
"""Writes tests/golden/bert: a tiny random BERT with mean pooling, and the results of transformers and PEFT with it.

Run: python scripts/reference/bert.py        (needs scripts/requirements-reference.txt; reruns are bit-equal)
"""

import string

from common import GOLDEN, randomise, write_adapter, write_folder, write_golden, write_training
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

FOLDER = GOLDEN / "bert"
MAX_LENGTH = 64
CONFIG = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": MAX_LENGTH, "type_vocab_size": 2,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02, "pad_token_id": 0, "position_embedding_type": "absolute",
}


def tokenizer(padding=0):
    """A WordPiece tokenizer of letters, digits, some punctuation and a few words. Most non-ASCII words become [UNK]."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(padding, "[PAD]")
    letters = list(string.ascii_lowercase + string.digits)
    words = ["the", "iron", "metal", "##s", "##ing", "how", "and", "is", "has", "ri", "##ver"]
    pieces = special + letters + [f"##{c}" for c in letters] + ["?", ",", ";", ":", "."] + words
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tok = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix="##"))
    tok.add_special_tokens(special)
    tok.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])])
    tok.decoder = decoders.WordPiece(prefix="##")
    return tok, len(vocabulary)


def main():
    tok, size = tokenizer()
    config = CONFIG | {"vocab_size": size}
    model = BertModel(BertConfig(**config))
    randomise(model, seed=1)
    named = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": MAX_LENGTH,
             "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
             "mask_token": "[MASK]", "strip_accents": None, "tokenize_chinese_chars": True}
    write_folder(FOLDER, model, config, tok, named, "mean_tokens", MAX_LENGTH)
    # All linear layers except the pooler, which embeddings do not use ("all-linear" would include it).
    write_adapter(FOLDER / "adapter", model, ["query", "key", "value", "intermediate.dense", "output.dense"], seed=2)
    sequences = write_golden(FOLDER, "mean_tokens", single=7, max_length=MAX_LENGTH)
    write_training(FOLDER, "mean_tokens", sequences, adapter=False, temperature=0.05)


if __name__ == "__main__":
    main()

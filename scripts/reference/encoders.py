#!/usr/bin/env python3
"""Writes tests/golden/{roberta,xlm-roberta,mpnet,distilbert,modernbert}: tiny random encoders, and the results of
transformers and PEFT with them.

Positions of RoBERTa begin after its padding id, which is 1 as in every RoBERTa. XLM-RoBERTa is shaped like multilingual-e5. The
longest text of MPNet reaches into its logarithmic relative-position buckets. ModernBERT has windows of 3 on both sides in two of
three layers, and no biases.

Run: python scripts/reference/encoders.py     (needs scripts/requirements-reference.txt; reruns are bit-equal)
"""

from bert import CONFIG, MAX_LENGTH, tokenizer
from common import GOLDEN, randomise, write_adapter, write_folder, write_golden
from transformers import (DistilBertConfig, DistilBertModel, ModernBertConfig, ModernBertModel, MPNetConfig, MPNetModel,
                          RobertaConfig, RobertaModel, XLMRobertaConfig, XLMRobertaModel)

SHARED = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type")}
OFFSET = {"pad_token_id": 1, "max_position_embeddings": MAX_LENGTH + 2, "layer_norm_eps": 1e-5}
LIKE_BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]

FAMILIES = {
    "roberta": (RobertaConfig, RobertaModel, "cls_token", LIKE_BERT, SHARED | OFFSET | {"type_vocab_size": 1}),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel, "mean_tokens", LIKE_BERT,
                    SHARED | OFFSET | {"type_vocab_size": 1}),
    "mpnet": (MPNetConfig, MPNetModel, "mean_tokens", ["q", "k", "v", "o", "intermediate.dense", "output.dense"],
              SHARED | OFFSET | {"relative_attention_num_buckets": 32}),
    "distilbert": (DistilBertConfig, DistilBertModel, "cls_token",
                   ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"], {
        "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": MAX_LENGTH,
        "activation": "gelu", "dropout": 0.1, "attention_dropout": 0.1, "sinusoidal_pos_embds": False,
        "pad_token_id": 0, "initializer_range": 0.02}),
    "modernbert": (ModernBertConfig, ModernBertModel, "mean_tokens", "all-linear", {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": MAX_LENGTH, "global_attn_every_n_layers": 3, "local_attention": 6,
        "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "hidden_activation": "gelu", "norm_eps": 1e-5,
        "norm_bias": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "mlp_dropout": 0.0,
        "embedding_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
        "sep_token_id": 3, "reference_compile": False}),
}


def main():
    for seed, (name, (Config, Model, pooling, targets, more)) in enumerate(FAMILIES.items(), start=20):
        folder = GOLDEN / name
        tok, size = tokenizer(more["pad_token_id"])
        config = {"architectures": [Model.__name__], "model_type": name, "vocab_size": size} | more
        model = Model(Config(**config))
        randomise(model, seed=seed)
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, "unk_token": "[UNK]",
                 "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
        write_folder(folder, model, config, tok, named, pooling, MAX_LENGTH)
        write_adapter(folder / "adapter", model, targets, seed=seed)
        write_golden(folder, pooling, single=7, max_length=MAX_LENGTH, script="encoders")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes tests/golden/{llama,qwen2,qwen3,gemma3}: tiny random decoders, and the results of transformers and PEFT with them.

Llama has the scaled rotary positions of Llama 3, biases in all layers and the configuration format of transformers 5. Qwen2 has
a window of 5 in its second layer only. Qwen3 is shaped like Qwen3-Embedding: a head width larger than hidden_size / heads, and
last-token pooling. Gemma 3 is shaped like EmbeddingGemma: bidirectional attention, windows of 6 in all layers but the third, two
rotary bases, mean pooling and two dense layers after it.

Run: python scripts/reference/decoders.py     (needs scripts/requirements-reference.txt; reruns are bit-equal)
"""

import mistral
from common import GOLDEN, randomise, write_adapter, write_folder, write_golden
from mistral import CONFIG, MAX_LENGTH
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers import (Gemma3TextConfig, Gemma3TextModel, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model,
                          Qwen3Config, Qwen3Model)

SHARED = {key: value for key, value in CONFIG.items()
          if key not in ("architectures", "model_type", "sliding_window", "rope_theta", "hidden_act")}

FAMILIES = {
    "llama": (LlamaConfig, LlamaModel, "lasttoken", (), {
        "attention_bias": True, "mlp_bias": True, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "qwen2": (Qwen2Config, Qwen2Model, "lasttoken", (), {
        "hidden_act": "silu", "rope_theta": 1000000.0, "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1}),
    "qwen3": (Qwen3Config, Qwen3Model, "lasttoken", (), {
        "head_dim": 16, "attention_bias": False, "hidden_act": "silu", "rope_theta": 1000000.0,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}),
    "gemma3_text": (Gemma3TextConfig, Gemma3TextModel, "mean_tokens",
                    ((48, "linear.Identity"), (24, "activation.Tanh")), {
        "num_hidden_layers": 4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 6,
        "sliding_window_pattern": 3, "use_bidirectional_attention": True, "query_pre_attn_scalar": 12,
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "num_key_value_heads": 1}),
}


def qwen_tokenizer():
    """A byte-level BPE tokenizer as that of Qwen, with an end token after every text. transformers rebuilds all but
    vocabulary, merges and post-processor, so another kind of tokenizer would differ there."""
    vocabulary = {piece: i for i, piece in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("o", "n"), ("i", "r"), ("ir", "on"), ("\u0120", "m")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tok = Tokenizer(models.BPE(vocabulary, merges))
    tok.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A <|endoftext|> $B:1 <|endoftext|>:1", special_tokens=[("<|endoftext|>", 0)])
    tok.decoder = decoders.ByteLevel()
    named = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": MAX_LENGTH, "eos_token": "<|endoftext|>",
             "pad_token": "<|endoftext|>", "padding_side": "right"}
    return tok, len(vocabulary), named


def llama_tokenizer():
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, "unk_token": "<unk>",
             "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "right"}
    return *mistral.tokenizer(), named


def main():
    for seed, (name, (Config, Model, pooling, dense, more)) in enumerate(FAMILIES.items(), start=10):
        folder = GOLDEN / name.removesuffix("_text")
        tok, size, named = qwen_tokenizer() if name.startswith("qwen") else llama_tokenizer()
        config = SHARED | {"architectures": [Model.__name__], "model_type": name, "vocab_size": size} | more
        model = Model(Config(**{**config, "rope_parameters": dict(config["rope_parameters"])}
                             if "rope_parameters" in config else config))
        # The norms of Gemma multiply by 1 + w.
        randomise(model, seed=seed, norm=0.0 if name == "gemma3_text" else 1.0)
        write_folder(folder, model, config, tok, named, pooling, MAX_LENGTH, dense)
        write_adapter(folder / "adapter", model, "all-linear", seed=seed)
        write_golden(folder, pooling, single=9, max_length=MAX_LENGTH, script="decoders")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes tests/golden/{llama,qwen2,qwen3,gemma3}: tiny random decoders, and what transformers and PEFT compute with them.

Llama has Llama 3's scaled rotary positions, biases everywhere and transformers 5's spelling of the positions. Qwen2 has a
window of 5 in its second layer alone. Qwen3 is shaped like Qwen3-Embedding: heads wider than the model's share, and last-token
pooling. Gemma 3 is shaped like EmbeddingGemma: tokens see both ways, windows of 6 in all layers but the third, two bases,
the mean, two dense layers after it.

Run: python scripts/reference/decoders.py     (needs scripts/requirements-reference.txt; a rerun gives the same bits)
"""

from common import GOLDEN, randomise, write_adapter, write_folder, write_golden
from mistral import CONFIG, MAX_LENGTH, tokenizer
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


def main():
    tok, size = tokenizer()
    for seed, (name, (Config, Model, pooling, dense, more)) in enumerate(FAMILIES.items(), start=10):
        folder = GOLDEN / name.removesuffix("_text")
        config = SHARED | {"architectures": [Model.__name__], "model_type": name, "vocab_size": size} | more
        model = Model(Config(**{**config, "rope_parameters": dict(config["rope_parameters"])}
                             if "rope_parameters" in config else config))
        # Gemma's norms multiply by 1 + w.
        randomise(model, seed=seed, norm=0.0 if name == "gemma3_text" else 1.0)
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, "unk_token": "<unk>",
                 "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "right"}
        write_folder(folder, model, config, tok, named, pooling, MAX_LENGTH, dense)
        write_adapter(folder / "adapter", model, "all-linear", seed=seed)
        write_golden(folder, pooling, single=9, max_length=MAX_LENGTH, script="decoders")


if __name__ == "__main__":
    main()

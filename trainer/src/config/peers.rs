//! Keys of sentence-transformers, transformers, PEFT, Tevatron and FlagEmbedding, and what they are called here.

/// What a key of another program is called here.
struct Peer {
    /// The other program's names of it.
    names: &'static [&'static str],
    /// The key here; empty if there is none.
    key: &'static str,
    /// How the value translates, or why there is no key.
    note: &'static str,
}

const fn peer(names: &'static [&'static str], key: &'static str, note: &'static str) -> Peer {
    Peer { names, key, note }
}

#[rustfmt::skip]
const PEERS: &[Peer] = &[
    // transformers: TrainingArguments and its callbacks.
    peer(&["per_device_train_batch_size", "train_batch_size"], "training.batch_size",
        "it counts the rows of all devices and accumulation steps together"),
    peer(&["gradient_accumulation_steps"], "training.batch_size",
        "set it to per-device batch size × devices × accumulation steps; the batch is computed in chunks"),
    peer(&["per_device_eval_batch_size", "eval_batch_size", "eval_accumulation_steps"], "",
        "evaluation chooses the number of texts by their tokens"),
    peer(&["gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"], "training.activation_memory",
        "0 recomputes all activations; by default, those are kept that memory has room for"),
    peer(&["num_train_epochs", "num_epochs"], "training.epochs", "the value is the same, a whole number"),
    peer(&["lr"], "training.learning_rate", "the value is the same"),
    peer(&["lr_scheduler_type", "lr_scheduler", "scheduler"], "training.schedule",
        "linear, cosine, or constant (constant_with_warmup)"),
    peer(&["optim", "optimizer"], "", "the optimizer is AdamW (adamw_torch)"),
    peer(&["adam_beta1", "adam_beta2"], "training.betas", "both in a list, [0.9, 0.999]"),
    peer(&["adam_epsilon"], "training.epsilon", "the value is the same"),
    peer(&["bf16", "bfloat16"], "model.dtype", "`bf16: true` is `dtype: bf16`"),
    peer(&["fp16", "half_precision"], "model.dtype", "`fp16: true` is `dtype: f16`"),
    peer(&["torch_dtype", "precision", "mixed_precision"], "model.dtype", "f32, bf16 or f16"),
    peer(&["logging_steps", "logging_strategy"], "logging.every", "a number of steps"),
    peer(&["report_to", "wandb", "wandb_project", "logging_dir"], "logging.tensorboard",
        "metrics go to metrics.jsonl and TensorBoard's event files, to no other tracker"),
    peer(&["eval_steps", "eval_strategy", "evaluation_strategy", "evaluation_steps"], "evaluation.every",
        "a number of steps, or epoch; 0 evaluates only before and after the training"),
    peer(&["eval_dataset", "eval_data", "evaluator", "evaluators"], "evaluation.sets", "a list of sets, each with `path` and `kind`"),
    peer(&["eval_on_start"], "", "the model is always evaluated before the first step"),
    peer(&["load_best_model_at_end"], "evaluation.load_best", "the value is the same"),
    peer(&["metric_for_best_model"], "evaluation.metric", "without the name of the set, as cosine_ndcg@10"),
    peer(&["greater_is_better"], "", "a greater value of `evaluation.metric` is better, but a lower `loss`"),
    peer(&["early_stopping_patience"], "evaluation.patience", "the value is the same"),
    peer(&["early_stopping_threshold"], "", "early stopping counts any improvement of `evaluation.metric`"),
    peer(&["save_steps", "save_strategy"], "checkpoint.every", "a number of steps, or epoch"),
    peer(&["save_total_limit"], "checkpoint.keep", "the best checkpoint is kept besides"),
    peer(&["resume_from_checkpoint"], "", "the flag --resume continues from the newest checkpoint"),
    peer(&["overwrite_output_dir"], "", "the folder of a finished run is never overwritten: give another `output`, or delete it"),
    peer(&["output_dir"], "output", "the value is the same"),
    peer(&["run_name"], "name", "the value is the same"),
    peer(&["data_seed"], "seed", "one seed serves the whole run"),
    peer(&["dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "preprocessing_num_workers"], "",
        "rows are read and tokenized in the background, with all cores"),
    peer(&["dataloader_drop_last"], "", "every row is used; the last batch of an epoch may be shorter"),
    peer(&["push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_token"], "",
        "training uploads nothing; OUTPUT/model is a folder in the layout of sentence-transformers"),
    peer(&["deepspeed", "fsdp", "fsdp_config", "ddp_find_unused_parameters", "accelerator_config"], "",
        "training is data parallel, and `launch --gpus N` or `--cpus N` starts the ranks"),
    peer(&["disable_tqdm", "log_level"], "", "the flag --quiet shows results and errors only"),
    peer(&["model_name_or_path", "model_name", "base_model"], "model.path", "the value is the same"),
    peer(&["tokenizer_name", "tokenizer", "tokenizer_name_or_path"], "model.path", "the tokenizer is read from the model folder"),
    peer(&["cache_dir", "model_cache_dir", "cache_path"], "", "the environment variable HF_HOME chooses the cache"),
    peer(&["trust_remote_code"], "", "no code of a model folder is ever run"),
    peer(&["train_data", "train_file", "train_dataset", "train_path", "dataset_name", "dataset_path"], "data.train",
        "a list of data sets, each with a `path`"),
    // sentence-transformers: losses, samplers, models.
    peer(&["scale"], "loss.temperature", "1 / scale: a scale of 20 is a temperature of 0.05. `loss.scale` is that of cosent"),
    peer(&["mini_batch_size"], "training.chunk_size", "the value is the same; by default, chunks are chosen by the free memory"),
    peer(&["batch_sampler"], "data.no_duplicates", "true is NO_DUPLICATES, false is BATCH_SAMPLER"),
    peer(&["multi_dataset_batch_sampler"], "data.batching", "per_dataset is PROPORTIONAL; mixed has rows of all data sets in a batch"),
    peer(&["prompts", "prompt"], "data.train.N.query_prompt", "`query_prompt` and `document_prompt` of each data set"),
    peer(&["matryoshka_dims"], "loss.matryoshka.dims", "the value is the same"),
    peer(&["matryoshka_weights"], "loss.matryoshka.weights", "the value is the same"),
    peer(&["max_seq_length", "max_length", "max_seq_len"], "model.max_query_length",
        "`max_query_length` and `max_document_length` stand for queries and documents"),
    peer(&["pooling_mode"], "model.pooling", "mean, cls or last_token"),
    peer(&["normalize_embeddings"], "model.normalize", "the value is the same"),
    peer(&["guide", "guide_model"], "loss.false_negative_margin",
        "the model itself is the guide: candidates that exceed the positive's cosine by more are left out"),
    peer(&["triplet_margin"], "loss.margin", "the value is the same"),
    peer(&["distance_metric"], "loss.distance", "cosine, euclidean or manhattan"),
    peer(&["gather_across_devices", "negatives_x_device", "negatives_cross_device", "negatives_across_devices"], "",
        "candidates are always gathered from all ranks"),
    // Tevatron and FlagEmbedding.
    peer(&["train_group_size", "train_n_passages"], "data.negatives", "it counts the negatives alone: train_group_size − 1"),
    peer(&["query_max_len", "query_max_length", "q_max_len"], "model.max_query_length", "the value is the same"),
    peer(&["passage_max_len", "passage_max_length", "p_max_len"], "model.max_document_length", "the value is the same"),
    peer(&["query_prefix", "query_instruction", "query_instruction_for_retrieval", "query_instruction_format"],
        "data.train.N.query_prompt", "the whole text that stands before a query, spaces included"),
    peer(&["passage_prefix", "passage_instruction", "passage_instruction_for_retrieval", "passage_instruction_format"],
        "data.train.N.document_prompt", "the whole text that stands before a document, spaces included"),
    peer(&["grad_cache"], "", "batches are always computed in chunks (GradCache)"),
    peer(&["gc_q_chunk_size", "gc_p_chunk_size", "sub_batch_size"], "training.chunk_size", "one value for queries and documents"),
    peer(&["pooler", "pooling_method", "sentence_pooling_method"], "model.pooling", "mean, cls or last_token (eos)"),
    peer(&["normalized", "normlized"], "model.normalize", "the value is the same"),
    peer(&["same_dataset_within_batch", "same_task_within_batch"], "data.batching", "true is per_dataset, false is mixed"),
    peer(&["use_inbatch_neg", "use_in_batch_neg"], "loss.in_batch_negatives", "the value is the same"),
    peer(&["knowledge_distillation", "kd_loss_type"], "loss.kind", "kl, with a column of scores in the data"),
    peer(&["fix_position_embedding"], "model.freeze", "[embeddings] freezes word, position and token-type embeddings"),
    // PEFT.
    peer(&["lora_r", "r"], "lora.rank", "the value is the same"),
    peer(&["lora_alpha"], "lora.alpha", "the value is the same"),
    peer(&["lora_dropout"], "lora.dropout", "the value is the same"),
    peer(&["lora_target_modules", "target_modules"], "lora.targets", "the value is the same, as a list"),
    peer(&["use_rslora"], "lora.rslora", "the value is the same"),
    peer(&["lora_name_or_path", "peft_model_path", "adapter_name_or_path"], "lora.path", "the value is the same"),
    peer(&["use_lora", "peft_config"], "lora", "the section switches LoRA on"),
    peer(&["use_dora", "modules_to_save", "lora_bias"], "", "it is not supported: adapters are plain LoRA"),
    peer(&["load_in_4bit", "load_in_8bit", "quantization_config"], "", "weights cannot be quantized; `model.dtype: bf16` halves them"),
];

/// What to write in place of `key`, if another program calls something so.
pub(super) fn answer(key: &str) -> Option<String> {
    let key = key.to_ascii_lowercase().replace('-', "_");
    let peer = PEERS.iter().find(|peer| peer.names.contains(&key.as_str()))?;
    Some(match peer.key {
        "" => format!("there is no such key: {}", peer.note),
        known => format!("use `{known}`: {}", peer.note),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::reference;

    #[test]
    fn every_answer_names_a_key_that_there_is() {
        let known = reference::keys();
        let mut names = BTreeSet::new();
        for peer in PEERS {
            assert!(peer.key.is_empty() || known.contains(&peer.key.to_owned()), "{}", peer.key);
            for name in peer.names {
                assert!(names.insert(name), "{name} is there twice");
                assert!(!known.contains(&(*name).to_owned()), "{name} is a key here");
            }
        }
    }
}

"""Functions of the golden writers: texts, rows, exact gradients, a short training run.

Everything is computed in float64 and stored as float32, so that a golden is more exact than any float32 implementation that is
compared with it. One thread and fixed seeds make reruns bit-equal.

transformers computes norms, softmax and rotations in float32 even in a float64 model; `exact` makes it use float64.

Files of a golden model, in addition to the model folder itself:

    golden.json          the texts, their token ids, and a description of the numbers below
    golden.safetensors   ids (T) u32 and offsets (N+1) u32 of the packed batch; hidden (T,D) after the last layer;
                         embeddings (N,D); direction (N,D); loss (1) = sum of embeddings * direction; grad.NAME for every
                         parameter NAME of model.safetensors that the loss reaches; and the same with the adapter on:
                         lora.hidden, lora.embeddings, lora.loss, lora.grad.NAME for NAME in adapter_model.safetensors.
                         golden.json also has transformers' own relative errors in bf16 and f16 against these numbers
    adapter/             the adapter, in PEFT's layout, with a B that is not zero
    rows.jsonl           forty rows: query, positive, one negative
    train.json           ten steps on them: losses, gradient norms before clipping, rates, every setting
    train.safetensors    grad.NAME: gradients of step 1 (before clipping); embeddings (N,D): golden.json's batch after the run
"""

import contextlib
import json
import math
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from sentence_transformers import SentenceTransformer, losses

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"

# None stands for a sequence of one token, which tokenizers with special tokens never produce.
TEXTS = [
    "the metal melts at a high heat",
    None,
    "a",
    "",
    "Which river flows through the old city, and how long is it?",
    "Zürich – naïve café №7",
    "iron is a metal; " * 16,
    "seven planets",
]

SUBJECTS = ["iron", "gold", "tin", "zinc", "neon", "radon", "mars", "venus", "peru", "chad", "mali", "oman"]
FACTS = ["melts at {n} degrees", "was found in {n}", "has {n} rivers", "weighs {n} grams", "turns in {n} hours"]
QUESTIONS = ["when does {s} melt?", "who found {s}, and when?", "how many rivers has {s}?", "what does {s} weigh?",
             "how long does {s} take to turn?"]


@contextlib.contextmanager
def exact():
    """Replaces the casts of transformers to float32 with casts to float64."""
    to, cast, arange, softmax = torch.Tensor.to, torch.Tensor.float, torch.arange, torch.nn.functional.softmax
    wide = lambda x: torch.float64 if x is torch.float32 else x

    def widened(function):
        def call(*args, **kwargs):
            return function(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})
        return call

    torch.Tensor.to, torch.Tensor.float = widened(to), torch.Tensor.double
    torch.arange, torch.nn.functional.softmax = widened(arange), widened(softmax)
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, cast
        torch.arange, torch.nn.functional.softmax = arange, softmax


def rows(count=40, seed=7):
    """Returns synthetic rows of different lengths. All texts are distinct, so masks of duplicates have no effect."""
    pick = random.Random(seed)
    seen, out = set(), []
    while len(out) < count:
        subject, kind, number = pick.choice(SUBJECTS), pick.randrange(len(FACTS)), pick.randrange(10, 2000)
        other = pick.choice([s for s in SUBJECTS if s != subject])
        tail = " and so on" * pick.randrange(0, 4)
        row = {
            "query": f"{number}: " + QUESTIONS[kind].format(s=subject),
            "positive": f"{subject} " + FACTS[kind].format(n=number) + tail,
            "negatives": [f"{other} " + FACTS[kind].format(n=number + 1)],
        }
        texts = [row["query"], row["positive"], *row["negatives"]]
        if seen.isdisjoint(texts) and len(set(texts)) == len(texts):
            seen.update(texts)
            out.append(row)
    return out


def randomise(model, seed, spread=0.15, norm=1.0):
    """Draws weights large enough that attention is far from uniform, and norms and biases different from `norm` and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * spread)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(norm + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_folder(folder, model, config, tokenizer, tokenizer_config, pooling, max_length, dense=()):
    """Writes a model folder in the legacy schema of sentence-transformers. `dense`: (outputs, activation) after pooling."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_torch(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    kinds = ["Transformer", "Pooling", *["Dense"] * len(dense), "Normalize"]
    paths = ["", *[f"{i}_{kind}" for i, kind in enumerate(kinds) if i > 0]]
    write_json(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths))
    ])
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": model.config.hidden_size,
        **{f"pooling_mode_{mode}": mode == pooling for mode in modes},
        "include_prompt": True,
    })
    width = model.config.hidden_size
    for i, (outputs, activation) in enumerate(dense, start=2):
        layer = folder / f"{i}_Dense"
        layer.mkdir(exist_ok=True)
        write_json(layer / "config.json", {"in_features": width, "out_features": outputs, "bias": i == 2,
                                           "activation_function": f"torch.nn.modules.{activation}"})
        generator = torch.Generator().manual_seed(i)
        tensors = {"linear.weight": torch.randn((outputs, width), generator=generator) * 0.2}
        if i == 2:
            tensors["linear.bias"] = torch.randn((outputs,), generator=generator) * 0.1
        save_torch(tensors, layer / "model.safetensors")
        width = outputs
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {
        "__version__": {"sentence_transformers": "5.0.0", "transformers": "4.50.0", "pytorch": "2.6.0"},
        "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine",
    })


def write_adapter(folder, base, targets, seed, rank=4, alpha=8):
    """Writes an adapter with PEFT. `base` is wrapped in place; open the folder again for a clean model."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=rank, lora_alpha=alpha, lora_dropout=0.0,
                        target_modules=targets)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                width = parameter.shape[1] if "lora_A" in name else 10
                parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) / math.sqrt(width))
    model.peft_config["default"].base_model_name_or_path = f"tests/golden/{folder.parent.name}"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # PEFT keeps these in a set, whose random order would get into the file.
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    written["target_modules"] = sorted(written["target_modules"])
    path.write_text(json.dumps(written, indent=2, sort_keys=True))


def open_as(folder, dtype, adapter=False, attention="eager"):
    """Opens a folder in sentence-transformers, without dropout."""
    chosen = {"attn_implementation": attention} if attention else {}
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32, **chosen})
    if adapter:
        # PEFT injects the adapter into the layers of the model, so the outer model stays.
        PeftModel.from_pretrained(model[0].auto_model, str(folder / "adapter"), is_trainable=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(dtype)


def open_double(folder, adapter=False):
    """Opens a folder in float64, with eager attention."""
    with exact():
        return open_as(folder, torch.float64, adapter)


def plain(name):
    """Maps the name of a parameter in SentenceTransformer to its name in (adapter_)model.safetensors."""
    name = name.removeprefix("0.auto_model.").removeprefix("0.model.")
    if name.split(".")[0].isdigit():
        name = name.replace(".", "_Dense.", 1)
    return "base_model.model." + name.replace(".default.", ".") if ".lora_" in name else name


def gradients(model, adapter=False):
    """Returns the trained parameters: with an adapter only its own, as in PEFT."""
    named = {plain(n): p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: grad for name, grad in named.items() if not adapter or ".lora_" in name}


def embed(model, sequences, pooling):
    """Encodes each sequence alone, without padding. Returns packed hidden states (T,D) and embeddings (N,D)."""
    hidden, pooled = [], []
    for ids in sequences:
        states = model[0].auto_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        hidden.append(states)
        pooled.append({"mean_tokens": states.mean(0), "cls_token": states[0], "lasttoken": states[-1]}[pooling])
    features = {"sentence_embedding": torch.stack(pooled)}
    for module in list(model)[2:]:
        features = module(features)
    return torch.cat(hidden), features["sentence_embedding"]


def relative_error(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def own_errors(folder, adapter, sequences, pooling, direction, want):
    """Returns the relative errors of transformers in half precision, with its default attention."""
    errors = {}
    for name, dtype in [("bf16", torch.bfloat16), ("f16", torch.float16)]:
        model = open_as(folder, dtype, adapter, attention=None).eval()
        hidden, embeddings = embed(model, sequences, pooling)
        (embeddings * direction.to(dtype)).sum().backward()
        grads = gradients(model, adapter)
        flat = lambda tensors: torch.cat([tensors[n].double().flatten() for n in sorted(grads)])
        errors[name] = {"hidden": relative_error(hidden, want["hidden"]),
                        "embeddings": relative_error(embeddings, want["embeddings"]),
                        "gradients": relative_error(flat(grads), flat({n: want[f"grad.{n}"] for n in grads}))}
    return errors


def write_golden(folder, pooling, single, max_length, script=None):
    """Writes golden.json and golden.safetensors. `single` is the token of the sequence of length one."""
    model = open_double(folder)
    texts = [t for t in TEXTS if t is not None]
    features = model.preprocess(texts)
    of_text = [row[mask.bool()].tolist() for row, mask in zip(features["input_ids"], features["attention_mask"])]
    left = iter(of_text)
    sequences = [[single] if t is None else next(left) for t in TEXTS]
    assert max(map(len, sequences)) == max_length, "no text was truncated"

    offsets = np.cumsum([0] + [len(s) for s in sequences]).astype(np.uint32)
    width = model.get_embedding_dimension()
    direction = torch.randn((len(sequences), width), generator=torch.Generator().manual_seed(3)).double()
    out = {"ids": np.array(sum(sequences, []), dtype=np.uint32), "offsets": offsets,
           "direction": direction.numpy().astype(np.float32)}
    direction = direction.float().double()
    errors = {}
    for prefix, adapter in [("", False), ("lora.", True)]:
        model = open_double(folder, adapter)
        model.eval()
        with exact():
            hidden, embeddings = embed(model, sequences, pooling)
            # Packed and padded sequences (sentence-transformers) have the same embeddings.
            padded = model(model.preprocess(texts))["sentence_embedding"]
        alone = embeddings[[i for i, t in enumerate(TEXTS) if t is not None]]
        assert (padded - alone).abs().max() < 1e-12, (padded - alone).abs().max()
        loss = (embeddings * direction).sum()
        loss.backward()
        arrays = {"hidden": hidden, "embeddings": embeddings, "loss": loss[None]}
        arrays |= {f"grad.{name}": grad for name, grad in gradients(model, adapter).items()}
        errors["adapter" if adapter else "whole"] = own_errors(folder, adapter, sequences, pooling, direction, arrays)
        out |= {prefix + name: value.detach().numpy().astype(np.float32) for name, value in arrays.items()}
    save_file(out, folder / "golden.safetensors")
    write_json(folder / "golden.json", {
        "written_by": f"scripts/reference/{script or folder.name}.py",
        "max_length": max_length, "loss": "sum(embeddings * direction)", "lora": {"rank": 4, "alpha": 8},
        "errors_of_transformers": errors,
        "sequences": [{"text": t, "ids": s} for t, s in zip(TEXTS, sequences)],
    })
    return sequences


def write_training(folder, pooling, sequences, adapter, temperature, max_length=24, batch=4, rate=1e-3,
                   weight_decay=0.01, warmup_ratio=0.1, clip=1.0):
    """Trains ten steps with the loss of sentence-transformers and AdamW of torch."""
    data = rows()
    with open(folder / "rows.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in data)
    model = open_double(folder, adapter)
    model.max_seq_length = max_length
    model.train()
    loss_of = losses.MultipleNegativesRankingLoss(model, scale=1 / temperature)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8)
    batches = [data[i:i + batch] for i in range(0, len(data), batch)]
    total, warmup = len(batches), math.ceil(len(batches) * warmup_ratio)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: s / max(1, warmup) if s < warmup else max(0.0, (total - s) / max(1, total - warmup)))
    curve, norms, rates, tokens, first = [], [], [], [], {}
    for part in batches:
        columns = [[r["query"] for r in part], [r["positive"] for r in part], [r["negatives"][0] for r in part]]
        features = [model.preprocess(c) for c in columns]
        tokens.append(sum(int(f["attention_mask"].sum()) for f in features))
        with exact():
            loss = loss_of(features, None)
        loss.backward()
        first = first or gradients(model)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, clip)))
        rates.append(schedule.get_last_lr()[0])
        curve.append(loss.item())
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), exact():
        after = embed(model, sequences, pooling)[1]
    arrays = {f"grad.{name}": grad for name, grad in first.items()} | {"embeddings": after}
    save_file({n: v.numpy().astype(np.float32) for n, v in arrays.items()}, folder / "train.safetensors")
    write_json(folder / "train.json", {
        "written_by": f"scripts/reference/{folder.name}.py", "starts_from": "adapter" if adapter else ".",
        "rows": "rows.jsonl", "batch_size": batch, "negatives": 1, "max_length": max_length,
        "temperature": temperature, "learning_rate": rate, "weight_decay": weight_decay, "decay_all": True,
        "betas": [0.9, 0.999], "epsilon": 1e-8, "warmup_ratio": warmup_ratio, "max_grad_norm": clip, "dropout": 0.0,
        "losses": curve, "grad_norms": norms, "learning_rates": rates, "tokens": tokens,
    })

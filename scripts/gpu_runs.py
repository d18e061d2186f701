#!/usr/bin/env python3
"""Small runs on one GPU: losses equal those of a CPU, resume is bit-equal, two ranks over NCCL equal one rank.

    LODESTONE_GPU=1 scripts/gpu_runs.py [TRAINER]

TRAINER is the program `trainer`, built with the feature `cuda`. Default: target/gpu/trainer; `scripts/gpu.sh build` puts it there,
with a copy of this script and of the models. Without LODESTONE_GPU the runs are skipped. Needs only python3.

NCCL requires one GPU for each rank of a host, so the ranks pretend to be on different hosts (NCCL_HOSTID).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In target/gpu, or in the repository.
COPIED = (HERE / "golden").is_dir()
GOLDEN = HERE / "golden" if COPIED else HERE.parent / "tests" / "golden"
TRAINER = HERE / "trainer" if COPIED else HERE.parent / "target" / "gpu" / "trainer"
STEPS = 50


class Failed(Exception):
    """A run that ends with an error or has unexpected results."""


def config(place, model, **sections):
    """Writes a configuration: 50 steps of 4 rows, with every chunk recomputed. JSON is valid YAML."""
    rows = GOLDEN / model / "rows.jsonl"
    training = {"batch_size": 4, "epochs": 5, "learning_rate": 1e-3, "chunk_tokens": 64, "activation_memory": 0}
    whole = {
        "output": str(place / "run"),
        "model": {"path": str(GOLDEN / model), "max_query_length": 24, "max_document_length": 24, "dropout": 0.1},
        "data": {"train": [{"path": str(rows)}], "negatives": 1},
        "training": training,
        "checkpoint": {"every": STEPS // 2, "keep": 2},
        "logging": {"tensorboard": False},
    }
    whole["model"] |= sections.pop("model_section", {})
    path = place / "config.yaml"
    path.write_text(json.dumps(whole | sections))
    return path


def start(trainer, path, *words, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [trainer, "train", str(path), *words, "--quiet"]
    # A file, because a full pipe would block a rank.
    said = tempfile.TemporaryFile("w+")
    return subprocess.Popen(command, env=inherited | environment, stdout=said, stderr=said), said


def finish(*started):
    """Waits for processes. Returns their output."""
    words = []
    for process, said in started:
        status = process.wait()
        said.seek(0)
        words.append(said.read())
        if status != 0:
            raise Failed(f"{' '.join(process.args)} failed with status {status}\n{words[-1]}")
    return words


def curve(path):
    lines = [json.loads(line) for line in (path.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    if len(lines) != STEPS:
        raise Failed(f"{path} has {len(lines)} steps, expected {STEPS}")
    return [(line["loss"], line["grad_norm"]) for line in lines]


def compare(what, got, want, tolerance):
    worst = max(abs(a - b) / abs(b) for pair in zip(got, want) for a, b in zip(*pair))
    print(f"{what}: losses and norms of {STEPS} steps differ by at most {worst:.1e}")
    if not worst <= tolerance:
        raise Failed(f"{what}: expected at most {tolerance:.0e}")


def run(trainer, place, device, model, **sections):
    place.mkdir()
    path = config(place, model, **sections)
    finish(start(trainer, path, LODESTONE_DEVICE=device))
    return path


def compare_with_cpu(trainer, folder, dtype, tolerance):
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    sections = {"lora": lora, "model_section": {"dtype": dtype, "tf32": False}}
    gpu, cpu = (run(trainer, folder / f"{device}-{dtype}", device, "mistral", **sections) for device in ("cuda", "cpu"))
    compare(f"Mistral with LoRA in {dtype}, GPU and CPU", curve(gpu), curve(cpu), tolerance)


def resumed(trainer, path):
    whole = curve(path)
    checkpoints = path.parent / "run" / "checkpoints"
    last = checkpoints / f"step-{STEPS:06}"
    bits = (last / "parameters.safetensors").read_bytes()
    shutil.rmtree(last)
    finish(start(trainer, path, "--resume", LODESTONE_DEVICE="cuda"))
    same = bits == (last / "parameters.safetensors").read_bytes() and curve(path) == whole
    print(f"resumed after step {STEPS // 2}: {'bit-equal' if same else 'NOT bit-equal'}")
    if not same:
        raise Failed("the resumed run differs from the uninterrupted one")


def two_ranks(trainer, folder):
    sections = {"model_section": {"tf32": False}}
    alone = run(trainer, folder / "alone", "cuda", "bert", **sections)
    place = folder / "ranks"
    place.mkdir()
    path = config(place, "bert", **sections)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "LODESTONE_DEVICE": "cuda", "LODESTONE_NCCL": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    ranks = [start(trainer, path, RANK=str(rank), NCCL_HOSTID=f"host-{rank}", **common) for rank in (0, 1)]
    if not all("nranks 2" in said for said in finish(*ranks)):
        raise Failed("the ranks did not use NCCL")
    compare("two ranks over NCCL and one rank", curve(path), curve(alone), 1e-4)


def main():
    if not os.environ.get("LODESTONE_GPU"):
        print("skipped: runs on a GPU (set LODESTONE_GPU=1)")
        return
    trainer = sys.argv[1] if len(sys.argv) > 1 else str(TRAINER)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        failed = False
        # In bf16 some values round differently, and 50 steps of training amplify it.
        for check, *arguments in (
            (compare_with_cpu, folder, "f32", 1e-3),
            (compare_with_cpu, folder, "bf16", 5e-2),
            (resumed, folder / "cuda-bf16" / "config.yaml"),
            (two_ranks, folder),
        ):
            try:
                check(trainer, *arguments)
            except (Failed, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Searches the files of trainer/benches/search.rs with IndexFlatIP of FAISS, as sentence-transformers does.

    scripts/search_faiss.py make FOLDER ROWS [WIDTH]           random embeddings: FOLDER/queries.npy, FOLDER/documents.npy
    cargo bench --workspace --bench search -- FOLDER/queries.npy FOLDER/documents.npy 60 FOLDER/found.bin
    scripts/search_faiss.py search FOLDER [K]                  prints time, peak memory, and the overlap of the results

Needs faiss-cpu and numpy. Like embeddings of texts, documents are clustered (1000 centres) and queries are close to documents.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np


def make(folder, rows, width=384):
    random = np.random.default_rng(1)
    centres = random.standard_normal((1000, width), dtype=np.float32)

    def save(name, base, noise):
        for start in range(0, rows, 1 << 14):
            part = base[start : start + (1 << 14)]
            part = part + noise * random.standard_normal(part.shape, dtype=np.float32)
            base[start : start + (1 << 14)] = part / np.linalg.norm(part, axis=1, keepdims=True)
        np.save(folder / name, base)
        return base

    documents = save("documents.npy", centres[random.integers(0, 1000, rows)], 1.0)
    save("queries.npy", documents[random.permutation(rows)], 0.03)


def search(folder, k=60):
    import faiss

    start = time.perf_counter()
    queries, documents = np.load(folder / "queries.npy"), np.load(folder / "documents.npy")
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    del documents
    found = np.concatenate([index.search(queries[i : i + 16384], k)[1] for i in range(0, len(queries), 16384)])
    seconds = time.perf_counter() - start
    flop = 2 * len(queries) * index.ntotal * index.d
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"faiss {faiss.__version__}, {faiss.omp_get_max_threads()} threads, {len(queries)} x {index.ntotal} x {index.d}, k {k}: "
          f"{seconds:.1f} s, {flop / seconds / 1e9:.0f} GFLOP/s, peak {peak} kB")
    ours = folder / "found.bin"
    if ours.is_file():
        ours = np.fromfile(ours, dtype="<u4").reshape(len(queries), k)
        same = sum(len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(ours, found))
        print(f"{same / ours.size:.6f} of the documents are the same, {np.mean(ours == found):.6f} at the same rank")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("make", "search"):
        sys.exit(__doc__)
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    {"make": make, "search": search}[sys.argv[1]](folder, *map(int, sys.argv[3:]))

"""What the doctor runs in processes of their own: python -m engine.doctor.inside PROBE [ARGUMENT ...] prints one JSON object.

A package that is half installed can raise anything, hang, or end its process; there it ends only this one. An error leaves its type and text in
`error`. Left out: judging what was found (parts.py).
"""

import importlib
import json
import os
import sys
import tempfile
import time


def package(name: str) -> dict:
    """Can it be imported?"""
    if name.startswith("transformer_engine"):
        importlib.import_module("torch")  # which brings the libraries that it is linked to, where they came in wheels
    return {"file": importlib.import_module(name).__file__}


def apex() -> dict:
    """NVIDIA's apex has fused layers; the package of that name on the index is a web toolkit."""
    module = importlib.import_module("apex")
    return {"is_nvidias": any(importlib.util.find_spec(f"apex.{part}") for part in ("normalization", "multi_tensor_apply")), "file": module.__file__}


def torch() -> dict:
    """The build, and the GPUs that it sees."""
    import torch

    cuda = torch.cuda
    gpus = [cuda.get_device_properties(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    return {"version": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
            "nccl": ".".join(map(str, cuda.nccl.version())) if torch.version.cuda else None,
            "gpus": [{"name": gpu.name, "gib": gpu.total_memory / 2**30, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus]}


def core(seconds: str) -> dict:
    """The C++ core: for a while, corpora are written, read, indexed and gathered, and every token compared with what plain numpy has."""
    import numpy as np

    from engine import _csrc
    from engine.data.indexed import IndexedCorpus, IndexedWriter

    random, end, num_tokens = np.random.default_rng(1), time.monotonic() + float(seconds), 0
    seq_len = 64
    with tempfile.TemporaryDirectory() as folder:
        while not num_tokens or time.monotonic() < end:
            documents = [random.integers(0, 60000, random.integers(1, 400)).astype(np.uint16) for _ in range(2000)]
            with IndexedWriter(f"{folder}/corpus", np.uint16) as writer:
                for tokens in documents:
                    writer.add_document(tokens)
            corpus = IndexedCorpus(f"{folder}/corpus")
            corpus.verify()
            order = random.permutation(len(documents)).astype(np.int32)
            starts = _csrc.sample_index_int32(np.array(corpus.sequence_lengths), order, seq_len)
            rows = random.permutation(len(starts) - 1).astype(np.int64)
            found, _ = corpus.gather(order, starts, rows, seq_len)
            text = np.concatenate([documents[d] for d in order]).astype(np.int64)
            if not np.array_equal(found, text[rows[:, None] * seq_len + np.arange(seq_len + 1)]):
                raise ValueError("tokens that were gathered are not those that were written")
            num_tokens += found.size
    return {"file": _csrc.__file__, "tokens": num_tokens}


def collective(backend: str, rank: str, world_size: str, store: str, device: str) -> dict:
    """A sum over ranks of 4 MiB (gloo) or 256 MiB (NCCL), once to open the connections and five times by the clock."""
    import datetime

    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(backend, store=dist.FileStore(store, int(world_size)), rank=int(rank), world_size=int(world_size),
                            timeout=datetime.timedelta(seconds=60))
    values = torch.full([(64 if device == "cuda" else 1) << 20], float(rank) + 1, device=device)
    dist.all_reduce(values)
    expected = int(world_size) * (int(world_size) + 1) / 2
    if not bool((values == expected).all()):
        raise ValueError(f"a sum over {world_size} ranks gave {values[0].item()}, expected {expected}")
    started = time.perf_counter()
    for _ in range(5):
        dist.all_reduce(values)
    values[0].item()  # waits for a GPU
    seconds = (time.perf_counter() - started) / 5
    dist.destroy_process_group()
    return {"gb_per_s": values.nbytes * 2 * (int(world_size) - 1) / int(world_size) / seconds / 1e9}


def disk(folder: str, mib: str = "256") -> dict:
    """Write and fsync one file, then read it past the page cache where the file system lets that be said."""
    block, count = os.urandom(8 << 20), max(int(mib) // 8, 1)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        started = time.perf_counter()
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with open(file.name, "rb", buffering=0) as again:
            while again.read(8 << 20):
                pass
        read = time.perf_counter() - started
    num_bytes = count * len(block)
    return {"write_gb_per_s": num_bytes / written / 1e9, "read_gb_per_s": num_bytes / read / 1e9}


def main(probe: str, *arguments: str) -> None:
    try:
        found = {"package": package, "apex": apex, "torch": torch, "core": core, "collective": collective, "disk": disk}[probe](*arguments)
    except BaseException as error:  # whatever it is, it is an answer
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

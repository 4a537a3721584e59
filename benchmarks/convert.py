"""Conversions beside transformers' own loading and saving, and beside litgpt's converter.

    python benchmarks/convert.py [--rounds 3] [--layers 22] [--memory]

A Llama of TinyLlama's shape (1.1 billion parameters with 22 layers), random weights in bf16, in one safetensors file that is in the page cache. Contestants take turns,
each conversion in a process of its own whose imports do not count. Ours: from-hf (weights -> checkpoint) and to-hf (checkpoint -> weights), with
no comparison of logits and no hashes, which the others do not make either. GB/s are bytes of weights per second. litgpt is
not a dependency of this tree: put it on PYTHONPATH to have it take part.
No contestant waits for the disk (fsync).
--memory: instead, the memory of our two conversions of the same model in fp32 (4.4 GB) in shards of 1 GB, sampled every 5 ms while they run, over that
of the process before: anonymous memory, which is what a conversion needs, and all that is resident, which counts the page cache's pages of files that
are mapped at that moment too.
"""

import argparse
import multiprocessing as mp
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
SHAPE = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
             rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)


def make(folder: Path, layers: int, dtype: str, shard: str = "100GB") -> int:
    """A Hugging Face folder of random weights; returns their bytes."""
    import torch
    import transformers

    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **SHAPE)).to(getattr(torch, dtype))
    network.save_pretrained(folder, max_shard_size=shard)
    return sum(p.numel() * p.element_size() for p in network.parameters())


def ours_from_hf(source: Path, target: Path):
    from data_tools.progress import Progress  # noqa: F401 (imports do not count, here and below)
    from engine import conversions
    from engine.hf.convert import run_of  # noqa: F401
    from engine.hf.shards import Ahead  # noqa: F401
    from engine.mcore import topology
    from launch import convert

    topology.start_single()
    from engine.mcore import build, checkpoint  # noqa: F401

    args = convert.parse(["from-hf", str(source), str(target), "--no-verify", "--no-hashes"])
    return lambda: convert.settle(conversions.from_hf, args)


def ours_to_hf(source: Path, target: Path, shard_gb: float = 100.0):
    from engine import conversions
    from engine.hf.export import export

    checkpoint = conversions.engine_checkpoints()
    run, tensors = checkpoint.read_config(source), checkpoint.read_tensors(source)
    return lambda: export(run, tensors, target, run.train.precision, shard_bytes=shard_gb * 1e9)


def transformers_load_save(source: Path, target: Path):
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    def run():
        model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model.save_pretrained(target, max_shard_size="100GB")
    return run


def litgpt_from_hf(source: Path, target: Path):
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    return lambda: convert_hf_checkpoint(target, model_name="tiny-llama-1.1b")


CONTESTANTS = {"ours, from-hf": (ours_from_hf, "hf"), "ours, to-hf": (ours_to_hf, "checkpoint"), "transformers, load + save": (transformers_load_save, "hf"),
               "litgpt, from-hf": (litgpt_from_hf, "hf")}


def once(prepare, source: Path, target: Path, pipe, sample: bool = False) -> None:
    """In a process of its own: seconds of wall and CPU, and the growth of anonymous and of resident memory in bytes if it is to be sampled."""
    try:
        work = prepare(source, target)
    except ImportError as error:
        return pipe.send(str(error))
    before, seen, done = memory_bytes(), [(0, 0)], threading.Event()
    watcher = threading.Thread(target=lambda: seen.extend(memory_bytes() for _ in iter(lambda: done.wait(0.005), True)))
    if sample:
        watcher.start()
    start = time.perf_counter(), time.process_time()
    work()
    found = time.perf_counter() - start[0], time.process_time() - start[1]
    done.set()
    pipe.send((*found, *(max(peak) - first for peak, first in zip(zip(*seen), before))))


def memory_bytes() -> tuple[int, int]:
    """Anonymous and resident memory of this process."""
    with open("/proc/self/status") as file:
        found = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in file) if key in ("RssAnon", "VmRSS")}
    return found["RssAnon"], found["VmRSS"]


def in_process(prepare, source: Path, target: Path, sample: bool = False):
    """What `once` found, or why it could not run."""
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=once, args=(prepare, source, target, theirs, sample))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return "it ended without an answer"
    finally:
        process.join()
        shutil.rmtree(target, ignore_errors=True)


def speed(args, work: Path) -> None:
    num_bytes = make(work / "hf", args.layers, "bfloat16")
    ours_from_hf(work / "hf", work / "checkpoint")()
    seconds = {name: [] for name in CONTESTANTS}
    for _ in range(args.rounds):
        for name, (prepare, source) in ((n, c) for n, c in CONTESTANTS.items() if args.only in n):
            found = in_process(prepare, work / source, work / "out")
            if isinstance(found, str):
                seconds.pop(name, None)
                print(f"{name}: left out ({found})")
            elif name in seconds:
                seconds[name].append(found)
    base = statistics.median(found[0] for found in seconds["transformers, load + save"])
    print(f"\n{num_bytes / 1e9:.2f} GB of weights, bf16\n\n| contestant | s | GB/s | CPU s | speed / transformers' | speed / litgpt's |\n| --- | --- | --- | --- | --- | --- |")
    other = statistics.median(found[0] for found in seconds["litgpt, from-hf"]) if seconds.get("litgpt, from-hf") else float("nan")
    for name, found in seconds.items():
        wall, cpu = (statistics.median(column) for column in list(zip(*found))[:2])
        print(f"| {name} | {wall:.2f} | {num_bytes / wall / 1e9:.2f} | {cpu:.2f} | {base / wall:.2f} | {other / wall:.2f} |")


def memory(args, work: Path) -> None:
    num_bytes = make(work / "hf", args.layers, "float32", "1GB")
    ours_from_hf(work / "hf", work / "checkpoint")()
    largest = max(path.stat().st_size for path in (work / "hf").glob("*.safetensors"))
    print(f"\n{num_bytes / 1e9:.2f} GB of weights, fp32, the largest shard {largest / 1e9:.2f} GB\n\n"
          "| conversion | anonymous, GB | / the largest shard | resident, GB | / the largest shard |\n| --- | --- | --- | --- | --- |")
    for name, prepare, source in (("from-hf", ours_from_hf, "hf"), ("to-hf", partial(ours_to_hf, shard_gb=1.0), "checkpoint")):
        *_, anonymous, resident = in_process(prepare, work / source, work / "out", sample=True)
        print(f"| {name} | {anonymous / 1e9:.3f} | {anonymous / largest:.2f} | {resident / 1e9:.3f} | {resident / largest:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--only", default="", help="contestants whose names hold this")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        (memory if args.memory else speed)(args, Path(folder))


if __name__ == "__main__":
    main()

"""Text to tokens: preprocess.py beside Megatron-LM's loop, in turns. One table: start-up, seconds net of it, MB/s, CPU-seconds.

  python benchmarks/_data_preprocess.py --megabytes 50 --rounds 1 --hf DIR --sentencepiece FILE

Megatron-LM's tool is not in its wheel, so the peer is a re-creation of what it does: a multiprocessing Pool whose workers take JSON
lines 32 at a time, parse them with json and tokenise document by document, and a main process that appends each to megatron-core's
IndexedDatasetBuilder. Its tokenizer is the `tokenizers` library itself; the original goes through transformers, which is slower.
Each run is a process of its own. Start-up is the same command on one short document. The corpus is Python source: the standard
library's and the installed packages', no file twice. Without --hf and --sentencepiece tokenizers are trained on its first megabytes.
The outputs are compared byte for byte. Left out: GPUs, and disks that are slower than the processor.
"""

import argparse
import filecmp
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def peer(source: str, prefix: str, spec: str, workers: int) -> None:
    """Megatron-LM's loop."""
    import multiprocessing

    import torch
    from megatron.core.datasets import indexed_dataset

    load_peer(spec)  # for the size of the vocabulary and the end of document
    pool = multiprocessing.Pool(workers, initializer=load_peer, initargs=(spec,))
    with open(source, encoding="utf-8") as lines:
        builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=indexed_dataset.DType.optimal_dtype(_tokenizer.vocab_size))
        for ids, lengths, _ in pool.imap(encode, lines, 32):
            builder.add_document(torch.tensor(ids, dtype=torch.int64), lengths)
    pool.close()
    pool.join()
    builder.finalize(f"{prefix}.idx")


def load_peer(spec: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path.insert(0, str(ROOT))
    from data_tools.tokenizer import load_tokenizer

    _tokenizer = load_tokenizer(spec)


def encode(line: str) -> tuple[list[int], list[int], int]:
    ids = _tokenizer.encode(json.loads(line)["text"])
    if ids:
        ids.append(_tokenizer.eod_id)
    return ids, [len(ids)] if ids else [], len(line)


def write_corpus(path: Path, megabytes: float) -> None:
    """Python files, one a line, until there are so many megabytes."""
    paths, seen, size = sysconfig.get_paths(), set(), 0
    with open(path, "w", encoding="utf-8") as out:
        for root in (paths["stdlib"], paths["purelib"]):
            for file in sorted(Path(root).rglob("*.py")):
                if size >= megabytes * 1e6:
                    return
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text and hash(text) not in seen:
                    seen.add(hash(text))
                    size += out.write(json.dumps({"text": text}) + "\n")


def command(name: str, source: Path, prefix: Path, spec: str, workers: int) -> list[str]:
    if name == "megatron's loop":
        return [sys.executable, __file__, "--peer", str(source), f"{prefix}_text_document", spec, str(workers)]
    tool = [sys.executable, str(ROOT / "data_tools/preprocess.py"), "--input", str(source), "--output-prefix", str(prefix), "--tokenizer", spec]
    return tool + ["--append-eod", "--quiet", "--workers", str(workers), "--fast", "auto" if name == "fast" else "off"]


def timed(arguments: list[str]) -> tuple[float, float]:
    """(seconds on the wall, CPU-seconds of the process and its workers)."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)}\n{errors.decode()}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hf", help="folder of a byte-level BPE")
    parser.add_argument("--sentencepiece", help="tokenizer.model of a SentencePiece BPE")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return peer(*arguments.peer[:3], int(arguments.peer[3]))
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    sources = {"short": folder / "short.jsonl", "long": folder / "long.jsonl"}
    sources["short"].write_text('{"text": "one short document"}\n')
    write_corpus(sources["long"], arguments.megabytes)
    megabytes = sources["long"].stat().st_size / 1e6
    specs = {kind: given or train(kind, folder) for kind, given in (("bpe", arguments.hf), ("sentencepiece", arguments.sentencepiece))}
    specs = {"byte-level BPE": f"hf:{specs['bpe']}", "SentencePiece BPE": f"sentencepiece:{specs['sentencepiece']}"}
    cases = [(kind, workers, name) for kind in specs for workers in arguments.workers for name in ("megatron's loop", "reference", "fast")]
    results = {case: [] for case in cases}  # of each round: ((wall, CPU) of start-up, (wall, CPU) of all)
    for _ in range(arguments.rounds):
        for case in cases:
            kind, workers, name = case
            prefix = folder / name.replace(" ", "_").replace("'", "")
            start_up = timed(command(name, sources["short"], prefix, specs[kind], workers))
            whole = timed(command(name, sources["long"], prefix, specs[kind], workers))
            results[case].append((start_up, whole))
            print(f"# {kind}, {workers} workers, {name}: {start_up} {whole}", file=sys.stderr, flush=True)
            for end in ("bin", "idx"):
                if not filecmp.cmp(f"{prefix}_text_document.{end}", f"{folder}/megatrons_loop_text_document.{end}", shallow=False):
                    sys.exit(f"{case}: .{end} differs from the peer's")
    report(results, megabytes)


def train(kind: str, folder: Path) -> Path:
    some = folder / "some.jsonl"
    with open(folder / "long.jsonl", encoding="utf-8") as lines:
        some.write_text("".join(line for line, _ in zip(lines, range(300))), encoding="utf-8")
    tool = [sys.executable, str(ROOT / "data_tools/train_tokenizer.py"), "--kind", kind, "--input", str(some), "--vocab-size", "16000"]
    timed([*tool, "--output", str(folder / kind)])
    return folder / kind / ("tokenizer.model" if kind == "sentencepiece" else "")


def report(results: dict, megabytes: float) -> None:
    """Medians over the rounds. Ratios are to the peer with as many workers."""
    print(f"{megabytes:.1f} MB, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, outputs identical\n")
    print("| tokenizer | workers | tool | start-up, s (CPU) | net, s | MB/s | x peer | net CPU-s | x peer |\n|---|---|---|---|---|---|---|---|---|")
    for (kind, workers, name), rounds in results.items():
        start_up, start_up_cpu = (statistics.median(short[i] for short, _ in rounds) for i in (0, 1))
        net, cpu = (statistics.median(whole[i] - short[i] for short, whole in rounds) for i in (0, 1))
        peers = results[kind, workers, "megatron's loop"]
        peer_net, peer_cpu = (statistics.median(whole[i] - short[i] for short, whole in peers) for i in (0, 1))
        print(
            f"| {kind} | {workers} | {name} | {start_up:.2f} ({start_up_cpu:.2f}) | {net:.2f} | {megabytes / net:.1f} | {peer_net / net:.2f} "
            f"| {cpu:.2f} | {peer_cpu / cpu:.2f} |"
        )


if __name__ == "__main__":
    main()

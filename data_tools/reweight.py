"""Weights of a mixture from the losses of two small runs, in the manner of DoReMi (arXiv 2305.10429).

  python data_tools/reweight.py runs/proxy runs/reference --output weights.yaml
  python data_tools/reweight.py runs/proxy runs/reference --set held_out --source data/web_valid=data/web --source data/code_valid=data/code
  python data_tools/reweight.py runs/proxy runs/reference --set web --set code --source web=data/web --source code=data/code

Both runs tell the loss of each source at the same steps: data.valid_by_source (data.split then gives the training corpora their own
names) or data.train_by_source (--set train), or one validation set per source, each named by a --set of its own. Over those steps
t, Algorithm 1 of the paper, from uniform weights:

    lambda_t[i] = max(0, loss of the proxy - loss of the reference)
    alpha_t = (1 - c) * normalised(alpha_(t-1) * exp(eta * lambda_t)) + c / k
    the answer: the mean of alpha_t over t

Simplified: the paper updates at every training step, clips the excess token by token, and trains the proxy on alpha_t as it moves (group
DRO). Here the proxy's own mixture stays, the excess is that of means at the steps where both runs were measured. So steps are few and
--eta larger than the paper's 1 may be wanted; and a proxy that is the reference again learns nothing: train it on other weights.
The fragment is a `data` section: put it into a configuration, or give the printed override. Left out: training the two runs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_tools.cli import UsageError, run_tool

MARK = "source_loss/"  # what engine/stages/pretrain.py calls the loss of a source


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reweight.py", description="Weights of a mixture from a proxy's excess losses over a reference (DoReMi).")
    parser.add_argument("proxy", metavar="PROXY_RUN", help="folder of the run whose excess loss counts")
    parser.add_argument("reference", metavar="REFERENCE_RUN", help="folder of the run it is compared with")
    parser.add_argument("--set", action="append", default=[], metavar="NAME", dest="sets",
                        help="the validation set with the losses by source (default: the first that has them); `train`: those of training; "
                             "several: one set per source")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PREFIX", help="the training corpus that a source stands for, where its "
                        "name in the losses is another")
    parser.add_argument("--eta", type=float, default=1.0, help="step size (default: 1, the paper's)")
    parser.add_argument("--smoothing", type=float, default=1e-3, metavar="C", help="share of uniform weights in each step (default: 1e-3, the paper's)")
    parser.add_argument("--output", metavar="FILE.yaml", help="write data.train with the weights")
    return parser


def reweight(args: argparse.Namespace) -> None:
    if not (math.isfinite(args.eta) and args.eta > 0):
        raise UsageError(f"--eta {args.eta:g}: expected a number above 0")
    if not 0 <= args.smoothing <= 1:
        raise UsageError(f"--smoothing {args.smoothing:g}: expected a number from 0 to 1")
    prefixes = _prefixes(args.source)
    proxy, reference = (losses(run, args.sets) for run in (args.proxy, args.reference))
    names, steps = _common(args, proxy, reference)
    if unknown := prefixes.keys() - set(names):
        raise UsageError(f"--source names {', '.join(sorted(unknown))}, but the losses are of {', '.join(names)}")
    excess = [[proxy[step][name] - reference[step][name] for name in names] for step in steps]
    weights = doremi(excess, args.eta, args.smoothing)
    corpora = [prefixes.get(name, name) for name in names]
    _print_table(corpora, steps, proxy, reference, names, weights)
    items = [item for weight, corpus in zip(weights, corpora) for item in (f"{weight:.6g}", corpus)]
    print(f"\ndata.train=[{','.join(items)}]")
    if args.output:
        _write(args.output, items)


def doremi(excess: Sequence[Sequence[float]], eta: float = 1.0, smoothing: float = 1e-3) -> list[float]:
    """The mean of the weights over all steps. excess: [steps][sources], proxy minus reference, in nats per token."""
    k = len(excess[0])
    alpha, total = [1 / k] * k, [0.0] * k
    for row in excess:
        exponents = [eta * max(0.0, value) for value in row]
        top = max(exponents)  # a common factor, which the normalisation takes out again
        grown = [a * math.exp(exponent - top) for a, exponent in zip(alpha, exponents)]
        alpha = [(1 - smoothing) * value / sum(grown) + smoothing / k for value in grown]
        total = [t + a for t, a in zip(total, alpha)]
    return [t / len(excess) for t in total]


def losses(folder: str, sets: Sequence[str]) -> dict[int, dict[str, float]]:
    """step -> loss of each source, of a run's metrics.jsonl. Raises UsageError where it has none."""
    from engine.log import read_metrics

    if not (Path(folder) / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} is no folder of a run: it has no metrics.jsonl")
    if len(sets) > 1:
        return _by_set(folder, sets)
    split = sets[0] if sets else _first_set(folder)
    records = read_metrics(folder, split) if split else []
    found = {record["step"]: {name.removeprefix(MARK): value for name, value in record.items() if name.startswith(MARK)} for record in records}
    found = {step: by_source for step, by_source in found.items() if by_source}
    if not found:
        raise UsageError(f"{folder}/metrics.jsonl has no losses by source{f' of {split}' if split else ''}; train with data.valid_by_source=true, or name one "
                         "validation set per source with --set")
    return found


def _by_set(folder: str, sets: Sequence[str]) -> dict[int, dict[str, float]]:
    from engine.log import read_metrics

    found: dict[int, dict[str, float]] = {}
    for name in sets:
        records = read_metrics(folder, name)
        if not records:
            raise UsageError(f"{folder}/metrics.jsonl has no validation set {name}")
        for record in records:
            found.setdefault(record["step"], {})[name] = record["valid_loss"]
    return found


def _first_set(folder: str) -> str | None:
    import orjson

    with open(Path(folder) / "metrics.jsonl", "rb") as file:
        for line in file:
            if MARK.encode() in line and line.endswith(b"\n"):
                record = orjson.loads(line)
                if "split" in record and any(name.startswith(MARK) for name in record):
                    return record["split"]
    return None


def _common(args, proxy: Mapping, reference: Mapping) -> tuple[list[str], list[int]]:
    """The sources, which both runs must have alike, and the steps at which both know the loss of each of them."""
    names, others = (list(dict.fromkeys(name for by_source in found.values() for name in by_source)) for found in (proxy, reference))
    if sorted(names) != sorted(others):
        raise UsageError(f"the runs tell losses of different sources: {args.proxy} of {', '.join(names)}; {args.reference} of {', '.join(others)}")
    if len(names) < 2:
        raise UsageError(f"the runs tell the loss of one source, {names[0]}; a mixture needs two or more")
    steps = [step for step in sorted(proxy.keys() & reference.keys())
             if all(found[step].get(name) is not None for found in (proxy, reference) for name in names)]
    if not steps:
        raise UsageError(f"at no step do both runs know the loss of every source; {args.proxy} was measured at {_few(proxy)}, {args.reference} at "
                         f"{_few(reference)}: give both the same train.eval_every, and train.eval_samples large enough to meet every source")
    return names, steps


def _few(steps) -> str:
    listed = sorted(steps)
    return ", ".join(map(str, listed[:5])) + (", ..." if len(listed) > 5 else "")


def _prefixes(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, prefix = pair.partition("=")
        if not (name and equals and prefix):
            raise UsageError(f"--source {pair}: expected NAME=PREFIX")
        found[name] = prefix
    return found


def _print_table(corpora, steps, proxy, reference, names, weights) -> None:
    width = max(6, *map(len, corpora))
    print(f"{len(steps)} steps, {steps[0]} to {steps[-1]}; losses are means over them\n")
    print(f"{'source':<{width}}  {'proxy':>9}  {'reference':>9}  {'excess':>9}  {'weight':>9}")
    for name, corpus, weight in zip(names, corpora, weights):
        p, r = (sum(found[step][name] for step in steps) / len(steps) for found in (proxy, reference))
        clipped = sum(max(0.0, proxy[step][name] - reference[step][name]) for step in steps) / len(steps)
        print(f"{corpus:<{width}}  {p:>9.4f}  {r:>9.4f}  {clipped:>9.4f}  {weight:>9.6f}")


def _write(path: str, items: list[str]) -> None:
    from omegaconf import OmegaConf

    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        Path(temporary).write_text(OmegaConf.to_yaml(OmegaConf.create({"data": {"train": items}})))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), reweight, argv)


if __name__ == "__main__":
    sys.exit(main())

"""The output layer with its loss on a CPU, side by side with peers in the same run: seconds, bytes at the worst moment, and the ratios to ours.

    python benchmarks/loss.py [--rounds 5] [--only ours,plain] [--threads 2]

Forward and backward of the shape that benchmarks/gpu_table.py takes, an eighth as large in tokens and width: 1,024 tokens, width 512, 131,072 ids.
ours: the loss mask is known beforehand, so gradients are made in the forward pass; ours-kept: logits kept once; plain: F.linear and
F.cross_entropy; torch: its own F.linear_cross_entropy in chunks, which makes gradients in the forward pass too. All in fp32. Bytes are what torch's profiler
says was allocated, in the last warm-up step, above what lay there before.
"""

import argparse
import statistics
import sys

import _turns
from _peak import peak_bytes

TOKENS, WIDTH, IDS = 1024, 512, 131072


def _inputs():
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((TOKENS, WIDTH), (IDS, WIDTH)))
    return hidden, weight.detach().div_(WIDTH**0.5).requires_grad_(), torch.randint(0, IDS, (TOKENS,), generator=generator)


def _step(loss_of):
    """step(i) -> (loss, peak bytes): of the last warm-up step, 0 of the others, which measure time."""
    hidden, weight, labels = _inputs()

    def both_ways():
        loss = loss_of(hidden, weight, labels)
        loss.backward()
        hidden.grad = weight.grad = None
        return float(loss)

    def step(i):
        if i != _turns.WARM_UP - 1:
            return both_ways(), 0
        most, loss = peak_bytes(both_ways)
        return loss, most

    return step


def ours(is_known: bool):
    import engine.mcore  # noqa: F401
    import torch
    from engine.mcore.linear_ce import linear_cross_entropy

    proportions = torch.ones(TOKENS) if is_known else None
    return _step(lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, IDS, proportions=proportions).mean())


def plain():
    import torch.nn.functional as F

    return _step(lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight), labels))


def torchs():
    import torch.nn.functional as F

    import torch

    options = torch.nn.LinearCrossEntropyOptions()
    return _step(lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options))


CONTESTANTS = {"ours": (ours, {"is_known": True}), "ours-kept": (ours, {"is_known": False}), "plain": (plain, {}), "torch": (torchs, {})}


def main() -> int:
    arguments = _turns.add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), CONTESTANTS, rounds=5).parse_args()
    turns = _turns.take_turns(_turns.chosen(CONTESTANTS, arguments.only), arguments, lambda answers: f"loss {answers[-1][0]:.6f}")
    if "ours" not in turns:
        return 1
    print("\n| contestant | s | ours / it | CPU s | ours / it | MB | ours / it |\n| --- | --- | --- | --- | --- | --- | --- |")
    found = {name: (statistics.median(turn.seconds), statistics.median(turn.cpu_seconds), turn.answers[-1][1] / 1e6) for name, turn in turns.items()}
    for name, figures in found.items():
        print(f"| {name} | " + " | ".join(f"{its:,.2f} | {own / its:.2f}" for own, its in zip(found["ours"], figures)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Gates of MLPs on a CPU beside the same written out, which is what megatron-core does: seconds forward and backward, bytes kept between them.

    python benchmarks/gates.py [--rounds 15] [--only clamped] [--threads 2]

2,048 tokens, width 4,096, fp32. Bytes kept: what autograd saves, each storage once.
"""

import argparse
import statistics
import sys

import _turns

TOKENS, WIDTH = 2048, 4096
ALPHA, LIMIT = 1.702, 7.0


def _step(gate):
    import torch

    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(TOKENS, 2 * WIDTH, generator=generator).requires_grad_(), torch.randn(TOKENS, WIDTH, generator=generator)

    def step(i):
        kept = {}

        def keep(t):
            if i < _turns.WARM_UP:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = gate(x)
        out.backward(grad)
        x.grad = None
        return sum(kept.values())

    return step


def ours(kind: str):
    from engine.mcore import gates

    return _step(gates.GeGLU(None) if kind == "geglu" else gates.SwiGLU(None) if kind == "swiglu" else gates.ClampedSwiGLU(None, ALPHA, LIMIT))


def plain(kind: str):
    import torch
    import torch.nn.functional as F

    def gate(x):
        g, u = x.chunk(2, -1)
        if kind == "clamped":
            g = g.clamp(max=LIMIT)
            return g * torch.sigmoid(ALPHA * g) * (u.clamp(-LIMIT, LIMIT) + 1)
        return (F.silu(g) if kind == "swiglu" else F.gelu(g, approximate="tanh")) * u

    return _step(gate)


CONTESTANTS = {f"{kind}:{function.__name__}": (function, {"kind": kind}) for kind in ("swiglu", "geglu", "clamped") for function in (ours, plain)}


def main() -> int:
    arguments = _turns.add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), CONTESTANTS, rounds=15).parse_args()
    turns = _turns.take_turns(_turns.chosen(CONTESTANTS, arguments.only), arguments, lambda answers: f"{answers[-1] / 1e6:,.0f} MB kept")
    print("\n| gate | ms | written out | ratio | MB kept | written out |\n| --- | --- | --- | --- | --- | --- |")
    for kind in dict.fromkeys(map(_turns.group, turns)):
        own, other = (turns.get(f"{kind}:{name}") for name in ("ours", "plain"))
        if own and other:
            ms, its = (1e3 * statistics.median(turn.seconds) for turn in (own, other))
            print(f"| {kind} | {ms:.0f} | {its:.0f} | {ms / its:.2f} | {own.answers[-1] / 1e6:.0f} | {other.answers[-1] / 1e6:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

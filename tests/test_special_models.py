"""Models with latent attention, caps and sinks in what the layouts' tests leave out: bf16 and a scalar head, whose losses are those of fp32 and
learn.

Left out: fp32 under every layout (test_parity.py), adapters (test_lora.py).
"""

import pytest
import ranks
from parity_table import CountTokens, batches, config

from engine.stage import Loss, Stage

MODELS = ("gemma", "moe-sinks", "latent-moe")


class Values(Stage):
    """A loss on one number per token."""

    def count(self, role, batch):
        return batch["loss_mask"].sum()

    def loss(self, role, output, batch):
        return Loss(sum=((output - batch["tokens"] / 100) ** 2 * batch["loss_mask"]).sum())


def losses(head):
    """On a rank: the losses of a few steps on one batch, by model and precision."""
    from engine.mcore import build, topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role

    found = {}
    for model in MODELS:
        for precision in ("fp32", "bf16"):
            run = config(model, {}, {"precision": precision, "micro_batch": 4}, 1)
            place = topology.start(run)
            network = ParallelModel(run, place, CountTokens() if head == "tokens" else Values(), "policy", Role(head=head))
            start = build.bare(network.chunks[0]).named_parameters()
            assert all(float(p.float().mean()) == (model != "gemma") for name, p in start if "layernorm" in name), "norms do not start as ones"
            found[model, precision] = []
            for step in range(4):
                found[model, precision].append(network.forward_backward(batches(run, 0, 1, 0)).loss)
                network.step(lr=3e-3, number=step + 1)
    return found


@pytest.mark.parametrize("head", ["tokens", "scalar"])
def test_bf16_and_fp32_learn_the_same(head):
    found = ranks.run(1, losses, head)[0]
    for model in MODELS:
        exact, rounded = found[model, "fp32"], found[model, "bf16"]
        assert exact[-1] < 0.97 * exact[0], model
        assert max(abs(a - b) for a, b in zip(exact, rounded)) < 0.02 * exact[0], model

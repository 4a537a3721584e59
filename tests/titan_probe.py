"""One step of the engine and of torchtitan in fp32 with equal weights and tokens, on a CPU: python tests/titan_probe.py JSON of the sizes.

Prints a JSON object of pairs [ours, theirs]: the loss, the gradient norm, and what their parameters number. A process of its own, because
torchtitan sets switches of torch for the whole of it.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from _gpu_titan import batch_of, trainer_of  # noqa: E402
from _gpu_work import LR, batches, network, run_of  # noqa: E402


def compared(sizes: dict) -> dict:
    trainer = trainer_of(sizes, attention="sdpa", compile=False, dtype="float32")
    run = run_of(sizes, train={"precision": "fp32"})
    ours = network(run)
    theirs, found = trainer.model_parts[0], {}
    load(trainer, theirs, run, ours)

    loss, micro_batches = 0.0, []
    for tokens in batches(sizes, 0):
        given, labels = batch_of(tokens)
        num = torch.tensor(labels.numel() * trainer.gradient_accumulation_steps)
        loss += trainer.forward_backward_step(input_dict=given, labels=labels, global_valid_tokens=num).item()
        micro_batches.append(dict(tokens=tokens[:, :-1], labels=labels, loss_mask=torch.ones(labels.shape), position_ids=given["positions"]))
    found["loss"] = [ours.forward_backward(micro_batches).loss, loss]
    squares = sum(parameter.grad.full_tensor().double().square().sum() for parameter in theirs.parameters())
    found["gradient norm"] = [ours.step(LR), squares.sqrt().item()]
    found["parameters"] = [sum(parameter.numel() for parameter in network.parameters()) for network in (ours.chunks[0], theirs)]
    return found


def load(trainer, theirs, run, ours) -> None:
    """Our weights into their network, over the names of transformers, which both know."""
    from test_model import weights
    from torch.distributed.tensor import distribute_tensor

    from engine.hf import llama

    spec = trainer.config.model_spec
    given = spec.state_dict_adapter(spec.model, None).from_hf(dict(llama.to_hf(run.model, weights(ours))))
    own = theirs.state_dict()
    assert own.keys() - {"tok_embeddings.weight"} <= given.keys()
    theirs.load_state_dict({name: distribute_tensor(given[name], own[name].device_mesh, own[name].placements) for name in own})


if __name__ == "__main__":
    print(json.dumps(compared(json.loads(sys.argv[1]))))

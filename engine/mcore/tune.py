"""Which parameters learn, how fast, and what else fine-tuning does to them: the `tune` section on a network spread over ranks.

    mark(network, run)                                # before DDP: freeze parts, and note each parameter's depth
    overrides = group_overrides(optimizer_config, run)   # megatron's parameter groups, one per depth where rates differ
    set_rates(optimizer, run, lr, number)             # before each step; drop_frozen_gradients likewise

Depth: 0 the embedding, 1 to L the layers, L + 1 what comes after them. Every rule follows from the step's number and the
configuration alone, so a resumed run needs no state for it.
"""

import hashlib

import torch
from megatron.core.optimizer import ParamKey, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from engine.mcore import masks, mtp

# --- which parameters learn -------------------------------------------------------------------------------------------


def mark(network, run) -> None:
    """Freeze what tune.freeze names and what has no loss, and give every parameter its `depth`."""
    for name, parameter in network.named_parameters():
        parameter.depth = _depth(name, network)
        is_kept = name.startswith(mtp.PREFIX) and not run.model.mtp.loss_weight
        if is_kept or any(_is_part(name, parameter.depth, part, run.model.num_layers) for part in run.tune.freeze):
            parameter.requires_grad = False


def _depth(name: str, network) -> int:
    if name.startswith("decoder.layers."):
        return network.decoder.layers[int(name.split(".")[2])].layer_number
    is_tied_copy = name == "output_layer.weight" and network.share_embeddings_and_output_weights
    return 0 if name.startswith("embedding.") or is_tied_copy else network.config.num_layers + 1


def _is_part(name: str, depth: int, part: str, num_layers: int) -> bool:
    """Does `part`, a word of tune.freeze, name this parameter? engine/checks.py has refused unknown words."""
    kind, _, span = part.partition(":")
    match kind:
        case "embedding":
            return depth == 0
        case "output":
            return depth > num_layers and "norm" not in name and not name.startswith(mtp.PREFIX)
        case "norms":
            return "norm" in name
        case "router":
            return ".router." in name
        case "experts":
            return ".experts." in name
    first, _, last = span.partition("-")
    low, high = (int(first), int(last or first)) if span else (0, num_layers - 1)
    return low <= depth - 1 <= high and 1 <= depth <= num_layers


def num_free_layers(run, number: int) -> int:
    """Layers that gradual unfreezing has freed, from the top, in step `number` (from 1)."""
    return 1 + (number - 1) // run.tune.unfreeze_every if run.tune.unfreeze_every else run.model.num_layers + 1


def is_free(depth: int, run, number: int) -> bool:
    """The embedding comes free one stride after the bottom layer."""
    return depth > run.model.num_layers - num_free_layers(run, number)


def drop_frozen_gradients(chunks, run, number: int) -> None:
    """Zero the gradients of what is not free yet, so that neither the norm nor Adam's moments see them."""
    if num_free_layers(run, number) > run.model.num_layers:
        return
    for parameter in _learning(chunks):
        if not is_free(parameter.depth, run, number):
            parameter.main_grad.zero_()


# --- how fast ---------------------------------------------------------------------------------------------------------


def group_overrides(config, run) -> dict | None:
    """megatron's config_overrides: a parameter group per depth where tune asks for it, else None for megatron's own groups."""
    tune = run.tune
    if tune.layer_lr_decay == 1.0 and not tune.unfreeze_every:
        return None
    by_depth = {ParamKey(predicate=ParamPredicate(name=f"depth_{depth}", fn=lambda p, depth=depth: p.depth == depth)): ParamGroupOverride(depth=depth)
                for depth in range(run.model.num_layers + 2)}
    return get_standard_config_overrides(config) | by_depth


def set_rates(optimizer, run, lr: float, number: int) -> None:
    """The learning rate of each parameter group in step `number`: lr * decay^(layers above it), and 0 until it is free."""
    top = run.model.num_layers
    for group in optimizer.param_groups:
        depth = group.get("depth", top)
        share = run.tune.layer_lr_decay ** max(top - depth, 0)
        group["lr"] = lr * share if is_free(depth, run, number) else 0.0


# --- what pulls and shakes them ---------------------------------------------------------------------------------------


class PullToStart:
    """L2-SP (arXiv 1802.01483, eq. 2): the loss gains weight / 2 * |w - w0|^2, w0 being the weights at `remember`.

    Its gradient is added after the reduction over replicas, so it counts once whatever the layout.
    """

    def __init__(self, weight: float):
        self.weight, self.start = weight, {}

    def remember(self, chunks) -> None:
        """Keep the present weights as w0, in the model's precision."""
        self.start = {id(p): p.detach().clone() for p in _learning(chunks)}

    def add_gradient(self, chunks, loss_scale: float) -> None:
        """main_grad += weight * (w - w0), in the units of a scaled loss."""
        for parameter in _learning(chunks):
            distance = parameter.detach().float() - self.start[id(parameter)].float()
            parameter.main_grad.add_(distance, alpha=self.weight * loss_scale)


def add_noise(network, batch: dict, run, topology) -> None:
    """Have the next forward pass of a training network add NEFTune's noise to its embeddings (arXiv 2310.05914, algorithm 1).

    Uniform in +- alpha / sqrt(s * h), drawn per row from run.seed and the row's sample number, so every layout draws the same.
    """
    if not (run.tune.neftune_alpha and network.training and network.pre_process):
        return
    rows = batch.get("row")
    if rows is None:
        raise ValueError(f"tune.neftune_alpha={run.tune.neftune_alpha} works with stages that number their rows (sft, reward, dpo); set it to 0")
    seq_len, hidden = batch["tokens"].size(1), run.model.hidden_size
    scale = run.tune.neftune_alpha / (seq_len * hidden) ** 0.5
    noise = torch.stack([_uniform(run.run.seed, int(row), seq_len, hidden) for row in rows], dim=1)  # [s, b, h]
    noise = noise[masks.local_positions(seq_len, topology.cp_rank, topology.cp)]
    if run.parallel.sequence_parallel:
        noise = noise.chunk(topology.tp)[topology.tp_rank]
    noise = noise.mul_(scale).to(batch["tokens"].device)

    def shake(module, inputs, output):
        handle.remove()
        return output + noise.to(output.dtype)

    handle = network.embedding.register_forward_hook(shake)


def _uniform(seed: int, row: int, seq_len: int, hidden: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/neftune/{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(seq_len, hidden, generator=generator).mul_(2).sub_(1)


def _learning(chunks):
    return (parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad)

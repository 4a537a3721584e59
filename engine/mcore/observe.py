"""Numbers about a model that is spread over ranks: MoE balancing losses and per-layer norms. Collective; the same on every rank."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.moe.moe_utils import (
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
)

from engine.mcore import mtp
from engine.mcore.build import bare


def moe_losses(model) -> dict[str, float]:
    """Each auxiliary loss of the last global batch, without its coefficient: mean over MoE layers and micro-batches.
    """
    names, is_moe = _loss_names(model.run.model.moe), model.run.model.moe_layers
    further = model.config.mtp_num_layers or 0  # layers for further tokens, of the last one's kind
    num_layers = model.config.num_layers + further
    tracker = get_moe_layer_wise_logging_tracker()
    for name in names:  # pp ranks without an MoE layer have no entry, but take part in the reduction
        tracker.setdefault(name, {"values": torch.zeros(num_layers, device=model.topology.device), "reduce_group": None,
                                  "avg_group": None, "reduce_group_has_dp": False})
    reduce_aux_losses_tracker_across_ranks(names)
    divisor = sum(is_moe + further * is_moe[-1:]) * model.num_microbatches
    losses = {name: float(tracker[name]["values"].sum()) / divisor for name in names}
    return losses


def _loss_names(moe) -> list[str]:
    balance = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss", "global_aux_loss": "global_load_balancing_loss"}
    names = [balance[moe.balance]] if moe.balance in balance and moe.aux_loss_coeff else []
    return names + (["z_loss"] if moe.z_loss_coeff else [])


def layer_norms(model) -> dict[str, dict[str, float]]:
    """L2 norms of weights, and of gradients (as clipped) where one rank holds them whole (not under zero1), by layer.

    {"weight": {"layer_00": .., "embedding": .., "output": ..}, "grad": {...}}
    """
    model.gather_weights()
    names = [f"layer_{i:02d}" for i in range(model.config.num_layers)] + ["embedding", "output", *(["mtp"] if model.run.model.mtp.num_layers else [])]
    squares = torch.zeros(2, 2, len(names), dtype=torch.float64, device=model.topology.device)  # [weight/grad, dense/expert, place]
    for chunk in model.chunks:
        for name, parameter in _own_parameters(bare(chunk)):
            where = 1 if ".experts." in name else 0, names.index(_place(name, bare(chunk)))
            squares[(0, *where)] += parameter.detach().double().square().sum()
            if parameter.requires_grad:
                squares[(1, *where)] += parameter.main_grad.double().square().sum()
    dense, experts = (part.contiguous() for part in squares.unbind(1))  # a collective does not write into a strided view
    dist.all_reduce(dense, group=mpu.get_model_parallel_group())
    dist.all_reduce(experts, group=mpu.get_expert_tensor_model_pipeline_parallel_group())
    norms = (dense + experts).sqrt().tolist()
    kinds = ("weight",) if model.run.parallel.zero1 else ("weight", "grad")
    return {kind: dict(zip(names, values)) for kind, values in zip(kinds, norms)}


def _own_parameters(chunk):
    """Parameters that this rank counts: no tied copy, and of what tp ranks share only the first rank's."""
    for name, parameter in chunk.named_parameters():
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
            yield name, parameter


def _place(name: str, chunk) -> str:
    if name.startswith("embedding"):
        return "embedding"
    if name.startswith("decoder.layers."):
        return f"layer_{chunk.decoder.layers[int(name.split('.')[2])].layer_number - 1:02d}"
    return "mtp" if name.startswith(mtp.PREFIX) else "output"  # the final norm and the output matrix

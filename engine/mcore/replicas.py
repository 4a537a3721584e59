"""Do the ranks that must hold the same weights hold the same? Bit for bit, by a fingerprint per parameter. Collective.

    found = mismatches(model)          # sentences, the same on every rank; empty: they agree

Compared are, each over its own process group: all parameters over dp and cp (those of experts over their own data-parallel group), what
tp ranks hold whole (norms, routers, biases behind row-parallel layers) over tp, and an embedding that serves as output matrix, which the first and
the last pp rank hold, over these. A fingerprint is two sums over the parameter's bits, one of them weighted by position, in 64-bit integers: any
single changed bit changes it. It is computed where the weights are, and 16 bytes per parameter travel.
Left out: the optimizer's state, which zero1 keeps once; FP8 parameters, whose bytes are compared as they would be multiplied.
"""

import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from engine.mcore.build import bare

PIECE = 1 << 24  # elements that are widened to 64 bits at once
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [2], on the tensor's device."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(INTEGERS[flat.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), PIECE):
        piece = bits[start:start + PIECE].long()
        sums[0] += piece.sum()
        sums[1] += (piece * torch.arange(start + 1, start + 1 + len(piece), device=bits.device)).sum()  # overflow wraps around, which is fine
    return sums


@torch.no_grad()
def mismatches(model) -> list[str]:
    """One sentence for each parameter that differs, with its ranks."""
    model.gather_weights()
    prints = {name: fingerprint(parameter) for name, parameter in _parameters(model)}
    found = []
    for group, names in _comparisons(model, prints):
        if group is not None and dist.get_world_size(group) > 1 and names:
            found += _differing(names, torch.stack([prints[name] for name in names]), group)
    return _known_everywhere(found, model.topology.device)


def _parameters(model) -> Iterator[tuple[str, torch.Tensor]]:
    for number, chunk in enumerate(model.chunks):
        prefix = f"chunk {number}: " if len(model.chunks) > 1 else ""
        for name, parameter in bare(chunk).named_parameters():
            yield prefix + name, parameter


def _comparisons(model, prints) -> Iterator[tuple[object, list[str]]]:
    """Process groups of this rank and the parameters that all of their ranks must hold alike, in an order that they share."""
    parameters = dict(_parameters(model))
    experts = [name for name, parameter in parameters.items() if not getattr(parameter, "allreduce", True)]
    dense = [name for name in parameters if name not in set(experts)]
    yield mpu.get_data_parallel_group(with_context_parallel=True), dense
    if experts:
        yield mpu.get_expert_data_parallel_group(), experts
    yield mpu.get_tensor_model_parallel_group(), [name for name in dense if not getattr(parameters[name], "tensor_model_parallel", False)]
    if model.topology.pp > 1:
        tied = {id(weight) for chunk in model.chunks if (weight := _tied(bare(chunk))) is not None}
        names = [name for name in dense if id(parameters[name]) in tied]
        if names:
            yield mpu.get_embedding_group(), names[:1]


def _tied(network):
    """The embedding that is the output matrix too, on the ranks that hold one."""
    holds = network.share_embeddings_and_output_weights and (network.pre_process or network.post_process)
    return network.shared_embedding_or_output_weight() if holds else None


def _differing(names: list[str], own: torch.Tensor, group) -> list[tuple[str, list[int], list[int]]]:
    """(parameter, ranks that hold what most hold, the others) for each that is not the same in all of the group."""
    extremes = torch.stack([own, ~own])  # the lowest and, turned around, the highest at once
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN, group=group)
    differs = (extremes[0] != ~extremes[1]).any(1).tolist()
    if not any(differs):
        return []
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    ranks, found = dist.get_process_group_ranks(group), []
    for row, name in enumerate(names):
        if differs[row]:
            values = [tuple(each[row].tolist()) for each in everyone]
            usual = max(values, key=values.count)
            found.append((name, [rank for rank, value in zip(ranks, values) if value == usual], [rank for rank, value in zip(ranks, values) if value != usual]))
    return found


def _known_everywhere(found: list, device: str) -> list[str]:
    """What any rank has found, as sentences."""
    is_any = torch.tensor([bool(found)], dtype=torch.int32, device=device)
    dist.all_reduce(is_any, op=dist.ReduceOp.MAX)
    if not is_any.item():
        return []
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), found))
    hosts = [host for host, _ in everyone]
    told = sorted({(name, tuple(usual), tuple(others)) for _, each in everyone for name, usual, others in each})
    return [_sentence(name, usual, others, hosts) for name, usual, others in told]


def _sentence(name: str, usual, others, hosts) -> str:
    named = lambda ranks: ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks)  # noqa: E731
    if len(usual) <= len(others) and len(usual) == 1:
        return f"{name} differs between ranks {named((*usual, *others))}"
    return f"{name} of rank {named(others)} is not that of rank {named(usual)}"

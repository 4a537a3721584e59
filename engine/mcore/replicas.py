"""Do the ranks that must hold the same weights hold the same? Bit for bit, by a fingerprint per parameter. Collective.

    found = mismatches(model)          # sentences, the same on every rank; empty: they agree

Compared are, each over its own process group: all parameters over dp and cp (those of experts over their own data-parallel group), what
tp ranks hold whole (norms, routers, biases behind row-parallel layers) over tp, and an embedding that serves as output matrix, which the
first and the last pp rank hold, over these; and likewise their fp32 masters where each rank holds its own. A fingerprint is two sums over the
bits, one of them weighted by position, in 64-bit integers: any single changed bit changes it. It is computed where the weights are, and 16 bytes
per parameter travel.
Left out: moments, which show in the weights one update later. With zero1 there is one master of each weight, and all copies are made of it anew
at every update, so that nothing but a faulty transfer can be found.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass

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
    weights = list(_weights(model))
    found = []
    for group, chosen in _comparisons(model, weights):
        if chosen and dist.get_world_size(group) > 1:
            found += _differing([weight.name for weight in chosen], torch.stack([fingerprint(weight.tensor) for weight in chosen]), group)
    return _known_everywhere(found, model.topology.device)


@dataclass(frozen=True)
class Weight:
    """A tensor, and the parameter that it is or is the fp32 master of."""

    name: str
    tensor: torch.Tensor
    parameter: torch.nn.Parameter


def _weights(model) -> Iterator[Weight]:
    for number, chunk in enumerate(model.chunks):
        prefix = f"chunk {number}: " if len(model.chunks) > 1 else ""
        for name, parameter in bare(chunk).named_parameters():
            yield Weight(prefix + name, parameter, parameter)
            if getattr(parameter, "main_param", None) is not None and not getattr(parameter, "main_param_sharded", False):
                yield Weight(f"{prefix}{name} (fp32 master)", parameter.main_param, parameter)


def _comparisons(model, weights: list[Weight]) -> Iterator[tuple[object, list[Weight]]]:
    """Process groups of this rank and what all of their ranks must hold alike, in an order that they share."""
    is_expert = lambda weight: not getattr(weight.parameter, "allreduce", True)  # noqa: E731
    dense = [weight for weight in weights if not is_expert(weight)]
    yield mpu.get_data_parallel_group(with_context_parallel=True), dense
    if len(dense) < len(weights):
        yield mpu.get_expert_data_parallel_group(), [weight for weight in weights if is_expert(weight)]
    yield mpu.get_tensor_model_parallel_group(), [weight for weight in dense if not getattr(weight.parameter, "tensor_model_parallel", False)]
    if model.topology.pp > 1:
        tied = [id(weight) for chunk in model.chunks if (weight := _tied(bare(chunk))) is not None]
        if tied:
            yield mpu.get_embedding_group(), [weight for weight in dense if id(weight.parameter) == tied[0]]


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

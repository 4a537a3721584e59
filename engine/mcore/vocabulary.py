"""A checkpoint whose vocabulary is smaller than the model's: how its embedding and output matrix grow, split over tp or not.

New rows start at the mean of the old ones: a new token is then as probable as the average token, and training goes on from there
without a jump. Padding rows are never read (linear_ce.py).
Left out: optimizer state, which does not grow; a vocabulary that shrinks, which is refused.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor

MATRICES = ("embedding.word_embeddings.weight", "output_layer.weight")


def grows(written, wanted) -> bool:
    """Do two Model sections differ by a larger vocabulary (or by its padding alone)?"""
    return wanted.vocab_size >= written.vocab_size and (wanted.vocab_size, wanted.padded_vocab_size) != (written.vocab_size, written.padded_vocab_size)


def allow_growth(state: dict) -> None:
    """Let dist_checkpointing fill the rows it has; the others come as zeros."""
    for part in state.values():
        for name, value in part.items() if isinstance(part, dict) else ():
            if name in MATRICES and isinstance(value, ShardedTensor):
                value.allow_shape_mismatch = True


@torch.no_grad()
def fill_new_rows(network, num_old: int, topology) -> None:
    """Give every row from num_old on the mean of the rows before it. Collective over tp."""
    for name, parameter in network.named_parameters():
        if name not in MATRICES:
            continue
        first = topology.tp_rank * len(parameter)
        num_here = min(max(num_old - first, 0), len(parameter))
        mean = parameter[:num_here].float().sum(0) / num_old
        dist.all_reduce(mean, group=mpu.get_tensor_model_parallel_group())
        parameter[num_here:] = mean.to(parameter.dtype)

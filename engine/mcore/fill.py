"""Whole tensors into a network that is spread over ranks, each rank taking its slices.

    fill(model, tensors)      # name of GPTModel.state_dict() on one rank -> tensor, as engine/hf's from_hf gives them

Left out: checkpoints, which dist_checkpointing reads slice by slice (checkpoint.py), and networks on one rank with a check of all names (build.fill).
"""

from collections.abc import Mapping

import torch
from megatron.core.dist_checkpointing.mapping import apply_factories

from engine.mcore.build import bare, sharded_tensors
from engine.mcore.checkpoint import name_of


@torch.no_grad()
def fill(model, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy into the parameters of a ParallelModel. `tensors` are read on every rank, one at a time."""
    for chunk in model.chunks:
        state = bare(chunk).sharded_state_dict(prefix="")
        apply_factories(state)
        for shard in sharded_tensors(state):
            lead = shard.prepend_axis_num  # axes that count layers and experts
            whole, offset = tensors[name_of(shard.key, list(shard.global_offset[:lead]))], shard.global_offset[lead:]
            local = shard.data.view(shard.local_shape[-whole.dim():])
            local.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, local.shape))])

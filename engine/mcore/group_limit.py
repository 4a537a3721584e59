"""Routing in which a token may use the experts of a few groups alone: DeepSeek-V2 (arXiv 2405.04434, sec. 2.2.2) and V3 (2412.19437, sec. 2.1.2).

    limit_groups(chunk, model)      # after GPTModel is built

megatron's own takes top_k / group_top_k experts for a group's score, which is neither model's rule for most sizes. Its router asks an object
that replays recorded choices, where there is one, for the top k; here that object chooses.
"""

import torch
from megatron.core.transformer.moe.router import TopKRouter


def limit_groups(chunk, model) -> None:
    """Have every router of a GPTModel choose as model.moe (config.Moe) says; nothing where experts are not grouped."""
    if not model.moe.num_groups:
        return
    for module in chunk.modules():
        if isinstance(module, TopKRouter):
            module.router_replay = GroupLimit(model.moe)


class GroupLimit:
    """What stands in the place of megatron's RouterReplay."""

    def __init__(self, moe):
        self.num_groups, self.group_top_k, self.group_score_top = moe.num_groups, moe.group_top_k, moe.group_score_top

    def get_replay_topk(self, scores: torch.Tensor, top_k: int, *_):
        """scores [tokens, experts], any bias in them -> (scores, numbers) [tokens, top_k] of the best experts in the best groups."""
        by_group = scores.unflatten(1, (self.num_groups, -1))
        best = by_group.topk(self.group_score_top, dim=2).values.sum(2).topk(self.group_top_k, dim=1).indices
        is_allowed = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, True)
        return by_group.masked_fill(~is_allowed[..., None], float("-inf")).flatten(1).topk(top_k, dim=1)

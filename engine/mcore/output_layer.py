"""megatron's output layer that, given labels, returns their log-probabilities instead of logits (linear_ce.py)."""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from engine.mcore.linear_ce import is_most_probable, linear_log_probability, log_probability_and_entropy


class OutputLayer(ColumnParallelLinear):
    """It stays a module with a forward: megatron's DDP waits for gathered parameters when a module is called."""

    softcap = 0.0  # of the logits; 0 caps nothing

    def forward(self, input_, weight=None, runtime_gather_output=None, labels=None, num_real=0, is_greedy=False, asked=None,
                with_entropy=False, temperature=1.0, proportions=None):
        """input_ [s, b, h], labels [b, s] -> log p(label) [b, s], fp32, or with is_greedy (without gradients) 1 where no token is more
        probable than the label, else 0; with_entropy: [b, s, 2], log p(label) and the entropy of the distribution it is drawn from, in nats;
        without labels logits, as megatron's.

        asked: int64 places in [s, b] that are wanted, counted through b first; all others get 0 and cost nothing.
        temperature: of the distribution of labels; without a softcap the caller divides the hidden states by it, which is the same.
        proportions: fp32, of the places in [s, b] that are asked: what the gradient of their log-probabilities will be, up to a factor.
        """
        if labels is None:
            logits, bias = super().forward(input_, weight, runtime_gather_output)
            return (self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits), bias
        assert self.softcap or temperature == 1.0
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        flat, targets = hidden.reshape(-1, hidden.size(-1)), labels.t().reshape(-1)
        if asked is not None:
            flat, targets = flat.index_select(0, asked), targets.index_select(0, asked)
        arguments = flat, self.weight if weight is None else weight, targets, num_real, self.tp_group
        if is_greedy:
            found = is_most_probable(*arguments)  # a softcap and a temperature tell no two logits apart
        elif with_entropy:
            found = log_probability_and_entropy(*arguments, cap=(self.softcap, temperature))
        else:
            found = linear_log_probability(*arguments, cap=(self.softcap, temperature), proportions=proportions)
        if asked is not None:
            found = found.new_zeros(labels.numel(), *found.shape[1:]).index_copy(0, asked, found)
        return found.view(hidden.size(0), hidden.size(1), *found.shape[1:]).transpose(0, 1)

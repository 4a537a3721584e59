"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, sec. 2.2): behind the last layer D more, the k-th of which says the token k further on.

    spec = block_spec(layer, num_layers, backend)     # GPTModel's mtp_block_spec, on the last pp rank
    batch |= targets(batch, num_layers)               # before a batch is cut for context parallel

h^k_i = norm(TRM_k(M_k [norm(Emb(t_{i+k})); norm(h^{k-1}_i)])), h^0 being what the output layer reads; embedding and output layer are those of
the main model, and log p of t_{i+1+k} is taken of h^k_i. The modules and their names in checkpoints are megatron's. Its loss is not used:
it is divided per micro-batch or by the main loss's count, computed for the padding of the vocabulary too, and its labels roll over the ends of
documents that a mask tells apart; engine/mcore/run.py divides by what the whole global batch counts. Its exchange of tokens between cp ranks
is not needed either, because tokens are rolled here while sequences are whole.
Left out: drawing several tokens at once from these layers (speculation), learned positions.
"""

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec

PREFIX = "mtp."  # of the names of all their parameters


def block_spec(layer: ModuleSpec, num_layers: int, backend: BackendSpecProvider) -> MultiTokenPredictionBlockSubmodules:
    """`num_layers` modules around a transformer layer of this spec, made of the backend's norms and linear layers."""
    spec = get_mtp_layer_spec_for_backend(layer, backend)
    spec.module = Layer
    return MultiTokenPredictionBlockSubmodules(layer_specs=[spec] * num_layers)


class Layer(MultiTokenPredictionLayer):
    """megatron's, that is given the tokens it reads instead of rolling them."""

    def _get_embeddings(self, input_ids, position_ids, embedding, hidden_states, packed_seq_params=None):
        """input_ids: `further_tokens` of this depth and those behind it, [depths * b, s / cp]."""
        own, rest = input_ids.split([hidden_states.size(1), input_ids.size(0) - hidden_states.size(1)])
        return rest, position_ids, embedding(input_ids=own, position_ids=position_ids), hidden_states


def transformer_layers(network) -> list:
    """All layers of a bare chunk, those in modules for further tokens behind the others."""
    further = network.mtp.layers if hasattr(network, "mtp") else []
    return [*network.decoder.layers, *(layer.transformer_layer for layer in further)]


def targets(batch: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """What each depth k = 1 .. D reads and is to say: further_tokens and further_labels int64 [D * b, s], further_mask fp32 [D * b, s], the rows of
    depth 1 first.

    Place i of depth k has token i + k and label i + k of its row. It counts as label i + k does, but not where token i + k is in another document (or
    behind the row's end): there the embedding would be one that the document does not have.
    """
    found = {"further_tokens": [], "further_labels": [], "further_mask": []}
    for k in range(1, num_layers + 1):
        mask = _rolled(batch["loss_mask"], k)
        if "segment_ids" in batch:
            mask = mask * (_rolled(batch["segment_ids"], k) == batch["segment_ids"])
        found["further_tokens"].append(_rolled(batch["tokens"], k))
        found["further_labels"].append(_rolled(batch["labels"], k))
        found["further_mask"].append(mask)
    return {name: torch.cat(rows) for name, rows in found.items()}


def _rolled(t: torch.Tensor, k: int) -> torch.Tensor:
    """[b, s], place i + k at place i, zeros at the end."""
    return torch.cat([t[:, k:], t.new_zeros(len(t), min(k, t.size(1)))], 1)

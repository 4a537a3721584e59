"""The name map against real megatron: the engine's model, loaded through it, computes transformers' logits."""

import pytest
import torch

from engine.hf.verify import agreement, prompts


def test_engine_and_transformers_agree(model):
    from engine.mcore.build import single_rank_logits

    tokens = prompts(model.run.model)
    ours = single_rank_logits(model.run, model.engine_tensors(), tokens)
    with torch.no_grad():
        theirs = model.network(tokens).logits
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    # Rounding leaves 5e-7; the exact GELU in place of its tanh form already makes 1e-4.
    agreement(ours, theirs, tolerance=1e-5)


@pytest.mark.parametrize("name,parts", [
    ("llama", ("linear_qkv.weight", "linear_fc1.weight", "input_layernorm.weight")),
    ("mixtral", ("router.weight", "linear_fc2.weight")),
    ("gpt2", ("linear_qkv.bias", "position_embeddings.weight", "linear_proj.weight")),
])
def test_the_comparison_notices_each_part(tiny, name, parts):
    """Rows of one tensor turned by one are enough to be refused."""
    from engine.mcore.build import single_rank_logits

    model = tiny(name)
    tokens = prompts(model.run.model)
    with torch.no_grad():
        theirs = model.network(tokens).logits
    for part in parts:
        tensors = model.engine_tensors()
        key = next(key for key in tensors if key.endswith(part))
        tensors[key] = tensors[key].roll(1, 0)
        with pytest.raises(ValueError, match="differ by at most"):
            agreement(single_rank_logits(model.run, tensors, tokens), theirs)

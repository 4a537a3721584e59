"""RoPE of every kind: angles and logits against transformers, the factor of cos and sin, and which changes are refused.

The oracle is transformers' LlamaRotaryEmbedding, driven through forward, and whole LlamaForCausalLM networks.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch

from engine.config import Model
from engine.rope import contradictions, inverse_frequencies
from engine.stage_sections import RopeScaling

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=16)
KINDS = {
    "linear": dict(rope_type="linear", factor=3.0),
    "dynamic": dict(rope_type="dynamic", factor=2.5),
    "yarn": YARN,
    "yarn, few turns": YARN | dict(beta_fast=2.0, beta_slow=0.25),
    "yarn, not truncated": YARN | dict(beta_fast=3.0, beta_slow=0.5, truncate=False),
    "yarn, mscale": YARN | dict(mscale=0.7, mscale_all_dim=1.3),
    "yarn, one mscale": YARN | dict(mscale=0.7),
    "yarn, attention factor": YARN | dict(attention_factor=1.7),
    "yarn, factor 1": YARN | dict(factor=1.0),
    "longrope": LONGROPE,
    "longrope, attention factor": LONGROPE | dict(attention_factor=0.9),
    "longrope, factor 1": LONGROPE | dict(factor=1.0),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "llama3, other bounds": dict(rope_type="llama3", factor=5.0, low_freq_factor=1.5, high_freq_factor=2.5,
                                 original_max_position_embeddings=40),
}
ORIGINAL = 16       # what transformers' dynamic takes from max_position_embeddings


def completed(parameters: dict, num_pairs: int) -> dict:
    """longrope wants one factor per pair."""
    if parameters["rope_type"] != "longrope":
        return parameters
    factors = np.linspace(1, 3, num_pairs).tolist()
    return parameters | dict(short_factor=factors, long_factor=[2 * f + 0.25 for f in factors])


def scaling_of(parameters: dict) -> RopeScaling:
    """Our fields of transformers' parameters, written out here so that engine/hf plays no part."""
    fields = {{"rope_type": "kind", "original_max_position_embeddings": "original_max_position"}.get(k, k): v for k, v in parameters.items()}
    return RopeScaling(**({"original_max_position": ORIGINAL} | fields))


def theirs(parameters: dict, head_dim: int, num_positions: int):
    """(cos, sin) [num_positions, pairs] of a fresh LlamaRotaryEmbedding."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=ORIGINAL,
                         rope_parameters=dict(parameters))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(num_positions)[None])
    return cos[0, :, :cos.size(-1) // 2], sin[0, :, :sin.size(-1) // 2]


def ours(scaling: RopeScaling, theta: float, dims: int, num_positions: int):
    frequencies, factor = inverse_frequencies(theta, dims, scaling, num_positions)
    assert frequencies.dtype == torch.float32 and frequencies.shape == (dims // 2,)
    angles = torch.arange(num_positions)[:, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


@pytest.mark.parametrize("head_dim, theta, share", [(8, 1e4, 1.0), (10, 77.0, 1.0), (128, 5e5, 1.0), (64, 1e4, 0.5), (80, 1e6, 0.4)])
@pytest.mark.parametrize("kind", KINDS)
def test_angles_equal_transformers(kind, head_dim, theta, share):
    dims = int(head_dim * share)
    parameters = completed(KINDS[kind], dims // 2)
    scaling = scaling_of(parameters)
    extra = {"rope_theta": theta} | ({"partial_rotary_factor": share} if share != 1 else {})
    for num_positions in (1, 15, 16, 17, 100, 1000):
        for mine, reference in zip(ours(scaling, theta, dims, num_positions), theirs(parameters | extra, head_dim, num_positions)):
            # rounding of one fp32 frequency, turned so many times; dynamic's base period is an fp32 number in transformers
            assert (mine - reference).abs().max() <= 1e-6 + num_positions * (6e-8 if scaling.kind == "dynamic" else 0), num_positions


def test_frequencies_are_bit_equal_where_transformers_computes_them_once():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for kind, parameters in KINDS.items():
        for head_dim, theta in ((10, 77.0), (64, 1e4), (128, 5e5)):
            parameters = completed(parameters, head_dim // 2)
            config = LlamaConfig(head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=ORIGINAL,
                                 rope_parameters=parameters | {"rope_theta": theta})
            reference, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=50)
            frequencies, our_factor = inverse_frequencies(theta, head_dim, scaling_of(parameters), 50)
            assert torch.allclose(frequencies, reference, rtol=1.2e-7, atol=0), kind      # one unit in the last place
            assert our_factor == pytest.approx(factor, rel=1e-15), kind


def test_plain_frequencies():
    frequencies, factor = inverse_frequencies(1e4, 6, RopeScaling(), 100)
    assert factor == 1 and frequencies.tolist() == pytest.approx([1, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)], rel=1e-6)


@pytest.mark.parametrize("factor", [1.0, 4.0, 7.5])
def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor(factor):
    """Equation 15 of arXiv 2309.00071: theta' = theta * F^(d/(d-2))."""
    plain, _ = inverse_frequencies(1e4, 12, RopeScaling(), 1)
    stretched, scale = inverse_frequencies(1e4, 12, RopeScaling(kind="ntk", factor=factor), 1)
    assert scale == 1 and stretched[0] == plain[0] == 1
    assert (plain[-1] / stretched[-1]).item() == pytest.approx(factor, rel=1e-6)
    assert stretched.tolist() == pytest.approx([(1e4 * factor ** (12 / 10)) ** (-i / 6) for i in range(6)], rel=1e-6)


# --- in the network ----------------------------------------------------------------------------------------------------


LLAMA = dict(vocab_size=61, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=10, max_position_embeddings=ORIGINAL, bos_token_id=None, eos_token_id=None)
LENGTHS = (40, 12, 16, 17, 30)      # the rows of a run get shorter and longer; no length may leave a trace in the next


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn, few turns", "yarn, attention factor", "longrope", "llama3"])
def test_logits_equal_transformers_at_every_length(kind, tmp_path):
    """A folder that transformers wrote -> engine/hf -> megatron's network, against the network that wrote it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.hf import FAMILIES
    from engine.hf.convert import run_of
    from engine.hf.load import open_hf

    parameters = completed(KINDS[kind], 5) | {"rope_theta": 500.0}
    network = LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=parameters)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    network.save_pretrained(tmp_path)
    hf, tensors = open_hf(tmp_path)
    run = run_of(hf, tensors, tmp_path, tmp_path / "run")
    chunk = one_chunk(run, dict(FAMILIES["llama"].from_hf(run.model, tensors)))
    plain = one_chunk(run.model_copy(update={"model": run.model.model_copy(update={"rope_scaling": RopeScaling()})}), chunk.state_dict())
    for length in LENGTHS:
        tokens = torch.randint(61, (2, length), generator=generator)
        network.model.rotary_emb = type(network.model.rotary_emb)(network.config)     # its dynamic kind remembers longer rows
        with torch.no_grad():
            reference = network(tokens).logits
        assert difference(logits(chunk, tokens), reference) < 1e-5, length
        is_plain_too = kind == "dynamic" and length <= ORIGINAL
        assert (difference(logits(plain, tokens), reference) < 1e-5) == is_plain_too, "the comparison does not see this scaling"


def one_chunk(run, tensors):
    from engine.mcore import build, topology

    topology.start_single()
    run = build.one_rank(run)
    chunk = build.build_chunk(run, build.transformer_config(run, "cpu"), "cpu")
    build.fill(chunk, {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)})
    return chunk.eval()


@torch.no_grad()
def logits(chunk, tokens):
    return chunk(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)[..., :61]


def difference(mine, reference) -> float:
    return ((mine - reference).abs().max() / reference.abs().max()).item()


def test_apply_rope_multiplies_what_it_turns():
    """Pair i as a complex number times factor * exp(1j * angle); what is not turned stays."""
    from engine.mcore.ops_torch import apply_rope

    generator = torch.Generator().manual_seed(0)
    config, factor = SimpleNamespace(rotary_interleaved=False, apply_rope_fusion=False), 1.3
    angles = torch.rand(5, 3, generator=generator, dtype=torch.float64) * 9
    t = torch.randn(5, 2, 1, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    freqs = torch.cat([angles, angles], 1)[:, None, None]
    turned = torch.complex(t[..., :3], t[..., 3:6]) * torch.polar(torch.full_like(angles, factor), angles)[:, None, None]
    assert torch.allclose(apply_rope(t, freqs, config, mscale=factor), torch.cat([turned.real, turned.imag, t[..., 6:]], -1), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, freqs, config, mscale=factor), (t,))


@pytest.mark.parametrize("kind, factor", [("yarn", 0.1 * math.log(8) + 1), ("llama3", 1.0)])
def test_a_factor_switches_the_fused_kernel_off(kind, factor):
    """Transformer Engine's kernel has no factor; megatron's own attention asks the configuration for it."""
    from megatron.core.transformer import attention

    from engine.mcore import rotary, topology

    topology.start_single()
    chunk = SimpleNamespace(config=SimpleNamespace(apply_rope_fusion=True), rotary_pos_emb=SimpleNamespace(cp_group=None))
    rotary.install(chunk, Model(**TINY, rope_scaling=dict(kind=kind)))
    assert attention._yarn_get_concentration_factor_from_config(chunk.config) == factor
    assert chunk.config.apply_rope_fusion == (factor == 1)


@pytest.mark.parametrize("kind, expected", [("dynamic", 24), ("longrope", 24), ("yarn", 7), ("none", 7)])
def test_documents_end_to_end_take_the_length_of_their_row(kind, expected):
    """As in the torch backend; kinds that do not depend on the length compute no more angles than the longest document needs."""
    from engine.mcore import rotary, topology

    topology.start_single()
    chunk = SimpleNamespace(config=SimpleNamespace(), rotary_pos_emb=SimpleNamespace(cp_group=None))
    rotary.install(chunk, Model(**TINY, rope_scaling=dict(kind=kind)))
    packed = SimpleNamespace(max_seqlen_q=7, max_seqlen_kv=7)
    config = SimpleNamespace(sequence_parallel=False, context_parallel_size=2, tensor_model_parallel_size=1)
    assert chunk.rotary_pos_emb.get_rotary_seq_len(None, None, torch.zeros(12, 1, 4), config, packed) == expected


def score(layout, scaling):
    """On a rank: log-probabilities of one batch."""
    import parity_table
    from training import merged

    from engine.config import validate
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role

    base = parity_table.config("dense", layout, {}, int(np.prod(list(layout.values()), initial=1))).model_dump()
    run = validate(merged(base, {"model": {"rope_scaling": scaling, "init_std": 0.3}}))
    model = ParallelModel(run, topology.start(run), parity_table.CountTokens(), "policy", Role(train=False))
    return model.score(parity_table.batches(run, 0, 1, 0)[:1])[0].numpy()


def test_context_parallel_chooses_by_the_whole_row():
    """Each of two ranks holds half of a row that is longer than the original length; alone it would be shorter."""
    import parity_table

    pairs = parity_table.config("dense", {}, {}, 1).model.head_size // 2
    scaling = dict(kind="longrope", factor=4.0, original_max_position=parity_table.SEQ * 3 // 4, short_factor=[1.0] * pairs,
                   long_factor=np.linspace(2, 9, pairs).tolist())
    expected, = ranks.run(1, score, {}, scaling)
    short, = ranks.run(1, score, {}, scaling | dict(original_max_position=parity_table.SEQ))
    assert np.abs(expected - short).max() > 1e-3      # the choice is seen in the scores
    for found in ranks.run(2, score, {"cp": 2}, scaling):
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)


# --- checkpoints and configurations ------------------------------------------------------------------------------------


TINY = dict(family="llama", num_layers=1, hidden_size=32, ffn_hidden_size=8, num_attention_heads=4, vocab_size=9)


@pytest.mark.parametrize("written, wanted, named", [
    ({}, {}, []),
    (dict(rope_theta=1e4), dict(rope_theta=5e5), ["model.rope_theta is 500000.0, but the checkpoint was trained with 10000.0"]),
    ({}, dict(rope_scaling=dict(kind="yarn")), ["model.rope_scaling.kind is yarn, but the checkpoint was trained with none"]),
    (dict(rope_scaling=dict(kind="yarn", factor=2)), dict(rope_scaling=dict(kind="yarn", factor=4, truncate=False)),
     ["model.rope_scaling.factor is 4.0, but the checkpoint was trained with 2.0", "model.rope_scaling.truncate is False"]),
    (dict(rope_scaling=dict(kind="linear", factor=2, beta_fast=1)), dict(rope_scaling=dict(kind="linear", factor=2, beta_fast=9)), []),
    (dict(rope_scaling=dict(factor=2)), dict(rope_scaling=dict(factor=3)), []),
    (dict(position="none", rope_theta=1), dict(position="none", rope_theta=2), []),
])
def test_contradictions_name_both_values_and_the_cure(written, wanted, named):
    found = contradictions(Model(**TINY, **written), Model(**TINY, **wanted))
    assert len(found) == len(named) and all(sentence.startswith(start) for sentence, start in zip(found, named)), found
    assert all("keep model.rope_" in sentence and "stage: long_context" in sentence for sentence in found)

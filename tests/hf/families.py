"""Tiny transformers models of every family, with odd shapes, and what a rank does with one: logits under a layout, training, saving.

    kind, sizes = MODELS["llama"]                                  # transformers' LlamaConfig(**sizes)
    ranks.run(2, train_layouts, checkpoint, layouts, tokens, out)   # a Trained for each layout, on each rank

Pickled to tests/ranks.py, so in a module. A new family adds its rows to MODELS; test_families.py does the rest.
"""

from typing import Any, NamedTuple

STEPS, SEQ, BATCH = 3, 32, 4

_NO_ENDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA = dict(vocab_size=131, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, head_dim=10, max_position_embeddings=64, **_NO_ENDS)
MIXTRAL = dict(vocab_size=77, hidden_size=40, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=6, max_position_embeddings=64, num_local_experts=6, num_experts_per_tok=2, **_NO_ENDS)
DENSE = {key: value for key, value in LLAMA.items() if key != "head_dim"}  # of a family whose configuration has none
QWEN3_MOE = dict(vocab_size=77, hidden_size=40, intermediate_size=36, moe_intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=6, max_position_embeddings=64, num_experts=6, num_experts_per_tok=2, **_NO_ENDS)
GPT2 = dict(vocab_size=101, n_positions=40, n_embd=36, n_layer=2, n_head=4, n_inner=50, bos_token_id=None, eos_token_id=None)
# An original length of 16 brings the wavelengths of a small head on both sides of both bounds.
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=4.0, low_freq_factor=1.5, high_freq_factor=3.0,
              original_max_position_embeddings=16)

YARN = dict(rope_type="yarn", rope_theta=1e5, factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0, truncate=True)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.0, 2.0, 3.0, 4.0])

_STRETCHED = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0,
                  truncate=True)
DEEPSEEK = dict(vocab_size=83, hidden_size=40, intermediate_size=52, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, n_group=4, topk_group=2,
                first_k_dense_replace=1, routed_scaling_factor=1.7, q_lora_rank=18, kv_lora_rank=14, qk_nope_head_dim=10, qk_rope_head_dim=6,
                v_head_dim=7, max_position_embeddings=64, rope_parameters=_STRETCHED | dict(mscale=1.0, mscale_all_dim=0.5), **_NO_ENDS)
_PLAIN_ROUTER = dict(n_group=1, topk_group=1, q_lora_rank=None)
GEMMA = dict(vocab_size=71, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
             max_position_embeddings=64, sliding_window=7, query_pre_attn_scalar=24, **_NO_ENDS)
_TURNS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_TWO_ROPES = dict(full_attention=dict(rope_type="linear", factor=3.0, rope_theta=1e5), sliding_attention=dict(rope_type="default", rope_theta=1e3))
GPT_OSS = dict(vocab_size=73, hidden_size=40, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
               max_position_embeddings=64, sliding_window=7, num_local_experts=6, num_experts_per_tok=2, swiglu_limit=1.0, swiglu_alpha=1.5,
               rope_parameters=_STRETCHED | dict(truncate=False), **_NO_ENDS)

MODELS = {
    "llama": ("Llama", LLAMA | dict(rope_parameters=LLAMA3)),
    "llama_tied": ("Llama", LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=6, head_dim=8, rms_norm_eps=1e-3,
                                         rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4))),
    "llama_bias": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "llama_geglu": ("Llama", LLAMA | dict(hidden_act="gelu_pytorch_tanh", intermediate_size=96)),
    "llama_attention_bias": ("Llama", LLAMA | dict(attention_bias=True)),
    "mixtral": ("Mixtral", MIXTRAL | dict(sliding_window=7)),
    "mixtral_tied": ("Mixtral", MIXTRAL | dict(tie_word_embeddings=True, num_experts_per_tok=3)),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=9)),
    "mistral_nemo": ("Mistral", LLAMA | dict(sliding_window=None, head_dim=14, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2": ("Qwen2", DENSE | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen2_tied": ("Qwen2", DENSE | dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen3": ("Qwen3", LLAMA),
    "qwen3_tied": ("Qwen3", LLAMA | dict(tie_word_embeddings=True, head_dim=6, use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE | dict(norm_topk_prob=True)),
    "qwen3_moe_mixed": ("Qwen3Moe", QWEN3_MOE | dict(num_hidden_layers=4, mlp_only_layers=[1], decoder_sparse_step=2, tie_word_embeddings=True,
                                                     use_sliding_window=True, sliding_window=6)),
    "phi3": ("Phi3", DENSE | dict(rope_parameters=LONGROPE, original_max_position_embeddings=24, sliding_window=11)),
    "phi3_partial": ("Phi3", DENSE | dict(tie_word_embeddings=True,
                                          rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75))),
    "olmo2": ("Olmo2", DENSE),
    "olmo2_tied": ("Olmo2", DENSE | dict(tie_word_embeddings=True, num_key_value_heads=6)),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | dict(topk_method="group_limited_greedy")),
    "deepseek_v2_lite": ("DeepseekV2", DEEPSEEK | _PLAIN_ROUTER | dict(topk_method="greedy")),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | dict(num_mtp_layers=0, n_shared_experts=1)),
    "deepseek_v3_tied": ("DeepseekV3", DEEPSEEK | _PLAIN_ROUTER | dict(num_mtp_layers=0, tie_word_embeddings=True,
                                                                      rope_parameters=dict(rope_type="default", rope_theta=5e4))),
    "gemma2": ("Gemma2", GEMMA | dict(attn_logit_softcapping=3.0, final_logit_softcapping=2.0)),
    "gemma2_untied": ("Gemma2", GEMMA | dict(attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False,
                                             layer_types=["full_attention"] * 2)),
    "gemma3": ("Gemma3Text", GEMMA | dict(num_hidden_layers=4, layer_types=_TURNS, rope_parameters=_TWO_ROPES)),
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False, n_inner=None, activation_function="relu")),
}

TP, PP, EP, CP = {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"ep": 2}, {"cp": 2}
FURTHER = {"olmo2": [{"tp": 2}, CP], "mistral": [CP], "qwen3": [{"tp": 2}, CP], "phi3": [CP],
           "deepseek_v3": [CP], "gemma2": [{"tp": 2}, CP], "gemma3": [CP], "gpt_oss": [CP]}
"""Layouts that a model is to be tried under beside tp, pp and, with experts, ep."""


def random_network(name: str, dtype=None, head: str = "CausalLM", **keys):
    """A transformers model whose every parameter is random, norms and biases too, so that a tensor put in the wrong place cannot pass for
    the right one."""
    import torch
    import transformers

    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes | keys)
    network = getattr(transformers, f"AutoModelFor{head}").from_config(config).to(dtype or torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
        for key, buffer in network.named_buffers():
            if key.endswith("e_score_correction_bias"):  # DeepSeek-V3's router learns it without gradients
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return network


def layouts_of(name: str) -> list[dict]:
    """The layouts of two ranks that a model is carried through; the first is that of one rank, twice."""
    has_experts = any("expert" in key for key in MODELS[name][1])
    tp = TP | {"etp": 1} if name == "gpt_oss" else TP  # experts with biases are not split
    return [{}, *FURTHER.get(name, []), PP, *([EP] if has_experts else []), tp]


class Trained(NamedTuple):
    """What happened under one layout, as one rank saw it."""

    logits: Any
    """fp32 [b, s, vocab] of the weights that were loaded; None on all but the last pp rank."""
    after: tuple
    """(losses, gradient norms, shards of the weights), as tests/parity_table.py compares them."""
    logits_after: Any
    """The same after training."""


def train_layouts(checkpoint: str, layouts: list[dict], tokens, out: str) -> list[Trained]:
    """On a rank: read a checkpoint under each layout, train it there for STEPS steps; the last one is saved to `out`."""
    return [_train(checkpoint, layout, tokens, out if layout is layouts[-1] else "") for layout in layouts]


def _train(checkpoint: str, layout: dict, tokens, out: str) -> Trained:
    from engine.mcore import checkpoint as checkpoints
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel
    from parity_table import CountTokens

    place = topology.start(run := configured(checkpoint, layout))
    model = ParallelModel(run, place, CountTokens(), "policy")
    checkpoints.load(model, checkpoints.find(checkpoint), optimizer=False)
    before = None if place.cp > 1 else logits_of(model, tokens)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(model.forward_backward(micro_batches(run, place, step)).loss)
        norms.append(model.step(lr=1e-3, number=step + 1))
    shards = [(key, shape, offset, values.numpy()) for key, shape, offset, values in checkpoints.local_shards(model)]
    if out:
        checkpoints.save(model, out, checkpoints.Position(step=STEPS))
    return Trained(before, (losses, norms, shards), None if place.cp > 1 else logits_of(model, tokens))


def configured(checkpoint: str, layout: dict):
    """The run of a converted model as it would be trained further, under a layout of two ranks."""
    from engine.config import validate
    from engine.mcore.checkpoint import read_config
    from training import merged

    raw = read_config(checkpoint).model_dump()
    return validate(merged(raw, {
        "run": {"device": "cpu"}, "model": {"hidden_dropout": 0.0, "attention_dropout": 0.0}, "parallel": layout, "data": {"train": ["unused"]},
        "train": {"seq_len": SEQ, "global_batch": BATCH, "steps": 100, "precision": "fp32"},
        "optim": {"eps": 1e-5},  # see tests/parity_table.py
    }), 2)


def micro_batches(run, place, step: int) -> list[dict]:
    """This replica's micro-batches of one global batch: single rows, with documents and a ragged loss mask."""
    import torch

    generator = torch.Generator().manual_seed(step)
    text = torch.randint(run.model.vocab_size, (BATCH, SEQ + 1), generator=generator)
    second = torch.arange(SEQ) >= torch.randint(1, SEQ, (BATCH, 1), generator=generator)
    starts = (~second).sum(1, keepdim=True)
    whole = dict(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=(torch.rand(BATCH, SEQ, generator=generator) < 0.8).float(),
                 segment_ids=second.int(), position_ids=torch.arange(SEQ) - second * starts)
    return [{name: tensor[row:row + 1] for name, tensor in whole.items()} for row in range(place.dp_rank, BATCH, place.dp)]


def logits_of(model, tokens):
    """fp32 [b, s, vocab] by megatron's schedule, gathered over tp, on the last pp rank; None on the others."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    batch, length = tokens.shape
    for chunk in model.chunks:
        chunk.eval()

    def step(_, chunk):
        output = chunk(tokens, torch.arange(length).expand(batch, -1), **model._attention({"tokens": tokens}, length))
        return output, lambda logits: (logits.sum(), torch.zeros([], dtype=torch.int), logits)

    with torch.no_grad():
        found = model._forward_backward(forward_step_func=step, data_iterator=iter([None]), model=model.chunks[0], num_microbatches=1,
                                        seq_length=length, micro_batch_size=batch, forward_only=True)
    if not found:
        return None
    parts = [torch.empty_like(found[0]) for _ in range(model.topology.tp)]
    dist.all_gather(parts, found[0].contiguous(), group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)[..., :model.run.model.vocab_size].float().numpy()

"""FLOPs against torch's counter on Hugging Face models, parameters against published totals and real models, and the small helpers."""

import math
import subprocess
import sys

import pytest

from engine.config import Model, validate
from engine.metrics import (Sums, flops_per_token, mfu, num_parameters, peak_tflops, step_flops, tflops_per_device)

TINY = dict(family="llama", num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=100, vocab_pad_multiple=1)


def tiny(**fields) -> Model:
    return Model(**{**TINY, **fields})


def of_size(family: str, size: str) -> Model:
    raw = dict(run=dict(dir="x"), model=dict(family=family, size=size, vocab_pad_multiple=1), data=dict(train=["x"]),
               train=dict(seq_len=16, global_batch=1, steps=1))
    return validate(raw).model


# Totals printed on the model cards or by `sum(p.numel())` of the released weights.
PUBLISHED = [
    ("llama", "llama2_7b", 6_738_415_616), ("llama", "llama2_13b", 13_015_864_320), ("llama", "llama2_70b", 68_976_648_192),
    ("llama", "llama3_8b", 8_030_261_248), ("llama", "llama3_70b", 70_553_706_496), ("llama", "llama3.2_1b", 1_235_814_400),
    ("llama", "llama3.2_3b", 3_212_749_824), ("mixtral", "8x7b", 46_702_792_704), ("mixtral", "8x22b", 140_630_071_296),
    ("mistral", "7b_v0.1", 7_241_732_096), ("mistral", "nemo_12b", 12_247_782_400), ("mistral", "small_24b", 23_572_403_200),
    ("qwen2", "qwen2.5_0.5b", 494_032_768), ("qwen2", "qwen2_7b", 7_615_616_512), ("qwen2", "qwen2.5_72b", 72_706_203_648),
    ("qwen3", "0.6b", 596_049_920), ("qwen3", "8b", 8_190_735_360), ("qwen3_moe", "30b_a3b", 30_532_122_624),
    ("qwen3_moe", "235b_a22b", 235_093_634_560), ("phi3", "mini_4k", 3_821_079_552), ("phi3", "phi4", 14_659_507_200),
    ("olmo2", "1b", 1_484_916_736), ("olmo2", "7b", 7_298_617_344),
    ("deepseek_v2", "16b_lite", 15_706_484_224), ("deepseek_v2", "236b", 235_741_434_880), ("deepseek_v3", "671b", 682_636_472_320),
    # of which 671.03e9 are the main model's; the published folder has two copies more, and scales: 685e9
   
    ("gemma2", "2b", 2_614_341_888), ("gemma2", "9b", 9_241_705_984), ("gemma2", "27b", 27_227_128_320),
    ("gemma3", "270m", 268_098_176), ("gemma3", "1b", 999_885_952), ("gpt_oss", "20b", 20_914_757_184), ("gpt_oss", "120b", 116_829_156_672),
    ("gpt2", "small", 124_439_808), ("gpt2", "xl", 1_557_611_200),
]


@pytest.mark.parametrize("family, size, total", PUBLISHED)
def test_parameters_of_published_models(family, size, total):
    assert num_parameters(of_size(family, size)).total == total


def test_active_parameters_of_mixtral():
    assert num_parameters(of_size("mixtral", "8x7b")).active == 12_879_925_248      # "12.9B" in arXiv 2401.04088


def test_dense_models_are_all_active():
    assert len(set(num_parameters(of_size("llama", "llama3_8b")))) == 1


def hf(name: str, **fields):
    import transformers

    config = getattr(transformers, name + "Config")(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, attn_implementation="eager", **fields)
    return getattr(transformers, name + "ForCausalLM")(config)


LATENT = dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
HF_MODELS = {
    "llama": (("Llama", dict(num_key_value_heads=2, tie_word_embeddings=False)), tiny(num_query_groups=2)),
    "llama, biases": (("Llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
                      tiny(linear_bias=True, tie_embeddings=True)),
    "qwen2": (("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=False)), tiny(num_query_groups=2, qkv_bias=True)),
    "qwen3": (("Qwen3", dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
              tiny(num_query_groups=2, head_dim=16, qk_norm=True, tie_embeddings=True)),
    "olmo2": (("Olmo2", dict(num_key_value_heads=2)), tiny(num_query_groups=2, qk_norm=True, qk_norm_width="all", norm_place="post")),
    "gemma2, norms on both sides": (("Gemma2", dict(num_key_value_heads=2, head_dim=8)), tiny(num_query_groups=2, tie_embeddings=True, norm_place="both")),
    "mixtral": (("Mixtral", dict(num_key_value_heads=2, num_local_experts=4, tie_word_embeddings=False)),
                tiny(num_query_groups=2, moe=dict(num_experts=4))),
    "deepseek, latent": (("DeepseekV3", dict(num_key_value_heads=4, first_k_dense_replace=3, **LATENT, tie_word_embeddings=False)), tiny(mla=LATENT)),
    "deepseek, latent, queries": (("DeepseekV3", dict(num_key_value_heads=4, first_k_dense_replace=3, **LATENT, tie_word_embeddings=True) | dict(q_lora_rank=None)),
                                  tiny(mla=LATENT | dict(q_lora_rank=0), tie_embeddings=True)),
    "deepseek, shared experts": (
        ("Dots1", dict(num_key_value_heads=4, head_dim=8, n_routed_experts=4, n_shared_experts=2, moe_intermediate_size=24,
                       first_k_dense_replace=1, n_group=1, topk_group=1, num_experts_per_tok=2, tie_word_embeddings=False)),
        tiny(head_dim=8, qk_norm=True, moe=dict(num_experts=4, ffn_hidden_size=24, shared_expert_ffn_hidden_size=48, first_dense_layers=1))),
}


@pytest.mark.parametrize("name", HF_MODELS)
def test_parameters_of_built_models(name):
    (family, fields), ours = HF_MODELS[name]
    assert num_parameters(ours).total == sum(p.numel() for p in hf(family, **fields).parameters())


def test_parameters_and_flops_of_modules_for_further_tokens():
    from transformers.modeling_layers import MtpModel

    main = hf("DeepseekV3", num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=1, n_group=1,
              topk_group=1, num_experts_per_tok=2, **LATENT, tie_word_embeddings=False, num_mtp_layers=2)
    modules = MtpModel(main, 2)
    moe = dict(num_experts=4, top_k=2, ffn_hidden_size=24, shared_expert_ffn_hidden_size=24, first_dense_layers=1)
    ours = tiny(mla=LATENT, moe=moe, mtp=dict(num_layers=2))
    assert num_parameters(ours).total == sum(p.numel() for p in {*main.parameters(), *modules.parameters()})
    plain, deeper = (flops_per_token(tiny(num_layers=n, moe=moe), 16) for n in (3, 5))
    assert flops_per_token(tiny(moe=moe, mtp=dict(num_layers=2)), 16) == deeper + 2 * 6 * (2 * 32 * 32 + 32 * 100)
    assert flops_per_token(tiny(moe=moe, mtp=dict(num_layers=2, loss_weight=0)), 16) == plain


def test_parameters_count_padding_positions_and_layernorm():
    padded, exact = tiny(vocab_pad_multiple=64), tiny()
    assert num_parameters(padded).total - num_parameters(exact).total == 2 * 28 * 32
    learned = tiny(position="learned")
    assert num_parameters(learned, seq_len=50).total - num_parameters(exact).total == 50 * 32
    assert num_parameters(tiny(position="learned", max_position=20), seq_len=10).total - num_parameters(exact).total == 20 * 32
    assert num_parameters(tiny(norm="layernorm")).total - num_parameters(exact).total == 7 * 32


def counted_flops(model, batch: int, seq: int) -> int:
    """Forward and backward FLOPs of all matrix products, by torch's own counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.zeros(batch, seq, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3", "deepseek, latent", "deepseek, latent, queries"])
@pytest.mark.parametrize("batch, seq", [(1, 16), (3, 40)])
def test_flops_equal_torchs_counter(name, batch, seq):
    (family, fields), ours = HF_MODELS[name]
    assert step_flops(ours, seq, batch) == counted_flops(hf(family, **fields), batch, seq)


def test_flops_of_an_ungated_model_equal_torchs_counter():
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=64, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0))
    assert step_flops(tiny(activation="gelu"), 16, 2) == counted_flops(model, 2, 16)


def test_flops_of_experts_equal_those_of_a_dense_model_as_wide_as_a_tokens_path():
    shared = dict(num_experts=8, top_k=3, ffn_hidden_size=20, shared_expert_ffn_hidden_size=12)
    assert flops_per_token(tiny(moe=shared), 16) == flops_per_token(tiny(ffn_hidden_size=3 * 20 + 12), 16)
    half = flops_per_token(tiny(num_layers=4, moe={**shared, "layer_freq": 2}), 16)
    assert 2 * half == flops_per_token(tiny(num_layers=4, moe=shared), 16) + flops_per_token(tiny(num_layers=4), 16)


def megatron_formula(L, h, ffn, heads, groups, head_size, vocab, seq, gated, causal):
    """The sum of Megatron-LM's `num_floating_point_operations` for a dense model, term by term in its letters."""
    q, kv = heads * head_size, groups * head_size
    attention = 6 * (h * (q + 2 * kv) + q * seq * (1 if causal else 2) + q * h)
    return L * attention + 6 * h * ffn * (3 if gated else 2) * L + 6 * h * vocab


@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_llama3_8b_by_megatrons_formula(causal):
    expected = megatron_formula(32, 4096, 14336, 32, 8, 128, 128256, 8192, True, causal)
    assert flops_per_token(of_size("llama", "llama3_8b"), 8192, causal) == expected


def test_flops_count_the_padded_vocabulary():
    assert flops_per_token(tiny(vocab_pad_multiple=64), 16) - flops_per_token(tiny(), 16) == 6 * 32 * 28


@pytest.mark.parametrize("device, bf16, fp8", [
    ("NVIDIA H100 80GB HBM3", 989.5, 1979), ("NVIDIA H100 PCIe", 756.5, 1513), ("NVIDIA H100 NVL", 835.5, 1670.5),
    ("NVIDIA H200", 989.5, 1979), ("NVIDIA A100-SXM4-80GB", 312, None), ("NVIDIA A100 80GB PCIe", 312, None),
    ("NVIDIA B200", 2250, 4500), ("NVIDIA GB200", 2500, 5000), ("NVIDIA L40S", 362.05, 733), ("NVIDIA L4", 121, 242.5), ("h100", 989.5, 1979),
])
def test_peaks_by_device_name(device, bf16, fp8):
    assert peak_tflops(device) == bf16
    assert peak_tflops(device, fp8=True) == fp8


@pytest.mark.parametrize("device", ["NVIDIA A10G", "NVIDIA GeForce RTX 5070", "Intel Xeon", ""])
def test_unknown_devices_have_no_peak_and_no_mfu(device):
    assert peak_tflops(device) is None
    assert mfu(10.0, peak_tflops(device)) is None


def test_throughput_and_mfu():
    assert tflops_per_device(8e15, 2.0, 8) == 500.0
    assert mfu(500.0, 1000.0) == 0.5


def test_peak_memory_grows_by_what_is_touched_and_counting_needs_no_torch():
    code = """if True:
        import sys
        from engine.metrics import peak_memory_gib
        before = peak_memory_gib()
        touched = b"x" * 2**28
        grown = peak_memory_gib() - before
        del touched
        assert 0.24 < grown < 0.5, grown
        assert peak_memory_gib() - before > grown - 0.01      # a peak does not fall; the kernel counts in batches of pages
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sums_divide_once():
    sums = Sums()
    sums.add("loss", 10.0, 1)
    sums.update({"loss": (2.0, 5), "accuracy": (3, 4), "nothing": (0.0, 0)})
    means = sums.means()
    assert means["loss"] == 2.0 and means["accuracy"] == 0.75      # a mean of means would give 5.2
    assert math.isnan(means["nothing"])


def test_sums_keep_no_graph_and_survive_division_in_place():
    import torch

    weight = torch.ones((), requires_grad=True)
    loss, sums = weight * 6, Sums()
    sums.add("loss", loss, torch.tensor(3))
    with torch.no_grad():
        loss.div_(2)
    assert sums.means() == {"loss": 2.0}
    assert not any(x.requires_grad for pair in sums._pairs.values() for x in pair)


def test_sums_reduce_over_ranks_in_one_call():
    sums, calls = Sums(), []
    sums.update({"b": (4.0, 2), "a": (1.0, 1)})

    def all_reduce(flat):      # the other rank holds a: (5, 1), b: (6, 3)
        calls.append(flat.tolist())
        flat += flat.new_tensor([5.0, 1.0, 6.0, 3.0])

    sums.reduce(all_reduce)
    assert calls == [[1.0, 1.0, 4.0, 2.0]]
    assert sums.means() == {"a": 3.0, "b": 2.0}

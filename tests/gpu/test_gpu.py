"""What only a GPU can show: each backend, FP8 recipe and overlap switch trains, and agrees with the CPU or with plain layers.

    python -m pytest tests/gpu -m gpu -rs        # -rs lists what this machine could not run, and why

All of it is skipped at once where there is no GPU; single tests say what more they need (Transformer Engine, a second GPU, a newer
one). Each training is a process of its own, started as a user starts it. Left out: speed, which benchmarks/ measures.
"""

import gpu
import numpy as np
import pytest
from training import MOE, merged, write_corpus

GPUS = gpu.num_gpus()
CAPABILITY = gpu.capability() if GPUS else (0, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="there is no GPU")]
needs_te = pytest.mark.skipif(bool(GPUS) and not gpu.has_te(), reason="needs Transformer Engine")
needs_two = pytest.mark.skipif(0 < GPUS < 2, reason="needs two GPUs")
TE = {"train": {"backend": "te"}}
BACKENDS = ["torch", pytest.param("te", marks=needs_te)]
# DeepSeek's sizes of a head, few of them. Its projections are in dims that FP8 takes.
LATENT = {"family": "deepseek_v3", "num_query_groups": 0, "qk_norm": False,
          "mla": {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}}
LATENT_MOE = {**LATENT, "moe": {**MOE, "first_dense_layers": 1}}
NEEDS = {"delayed": ((8, 9), (99,)), "tensorwise": ((8, 9), (99,)), "blockwise": ((9, 0), (99,)), "mxfp8": ((10, 0), (12, 0))}
RECIPES = [pytest.param(recipe, marks=[needs_te, pytest.mark.skipif(bool(GPUS) and not least <= CAPABILITY < beyond,
                                                                  reason=f"{recipe} needs compute capability {least} or more, below {beyond}")])
           for recipe, (least, beyond) in NEEDS.items()]


@pytest.fixture
def run(raw_run):
    """raw_run in the sizes that every kernel takes (FP8 wants multiples of 32), in bf16, with plain layers."""
    return merged(raw_run, {
        "model": {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "qk_norm": True},
        "train": {"seq_len": 64, "precision": "bf16", "backend": "torch"},
    })


@pytest.fixture
def start(run, tmp_path):
    """Weights written by a CPU rank, from which every device and backend can start: initial draws differ between devices."""
    gpu.train(run, {"run": {"dir": str(tmp_path / "start")}, "train": {"precision": "fp32", "steps": 1}, "schedule": {"decay_steps": 6}},
              device="cpu")
    return {"checkpoint": {"load": str(tmp_path / "start"), "load_optimizer": False}}


@pytest.fixture
def one_epoch(tmp_path):
    """A corpus that no run here reads twice: how often one is read decides the order of its samples, which a run of fewer steps would have otherwise."""
    return {"data": {"train": [write_corpus(tmp_path / "long", num_documents=1000)]}}


def at(tmp_path, name):
    return {"run": {"dir": str(tmp_path / name)}}


def losses(lines):
    return np.array([line["loss"] for line in lines])


def numbers(lines):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


# --- the same numbers as a CPU, or as plain layers -----------------------------------------------------------------------


@pytest.mark.parametrize("precision, rtol", [("fp32", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_equal_the_cpus(run, start, tmp_path, backend, precision, rtol):
    """Six steps with document masks from the same weights; the CPU computes in fp32, te's matrix products of fp32 in TF32."""
    cpu = gpu.train(run, start, at(tmp_path, "cpu"), {"train": {"precision": "fp32"}}, device="cpu")
    ours = gpu.train(run, start, at(tmp_path, "gpu"), {"train": {"precision": precision, "backend": backend}})
    np.testing.assert_allclose(losses(ours), losses(cpu), rtol=rtol)


def test_output_layer_and_loss_in_blocks():
    """Its compiled parts, and products that are added up in fp32; bf16 rounds the logits, fp32 products are no TF32."""
    for case, errors in gpu.loss_errors().items():
        assert max(errors) < (1e-2 if "bfloat16" in case else 1e-5), case


@needs_te
@pytest.mark.parametrize("model", [{"moe": MOE}, {"tie_embeddings": True, "qkv_bias": True}, {"sliding_window": 16},
                                   LATENT, LATENT_MOE, {**LATENT, "mla": {**LATENT["mla"], "q_lora_rank": 0}},
                                   {"position": "learned", "norm": "layernorm", "activation": "gelu", "linear_bias": True, "qk_norm": False}], ids=str)
def test_te_equals_plain_layers(run, tmp_path, model):
    """MoE runs grouped matrix products here. Both start from the same draw, which goes by the parameter's name."""
    plain, te = (gpu.train(run, {"model": model}, at(tmp_path, backend), {"train": {"backend": backend}}) for backend in ("torch", "te"))
    np.testing.assert_allclose(losses(te), losses(plain), rtol=2e-2)


@needs_te
def test_grouped_products_equal_one_product_per_expert(run, tmp_path):
    grouped, single = (gpu.train(run, TE, at(tmp_path, str(flag)), {"model": {"moe": {**MOE, "grouped_gemm": flag}}}) for flag in (True, False))
    np.testing.assert_allclose(losses(grouped), losses(single), rtol=5e-3)


@needs_te
@pytest.mark.parametrize("change", [{}, {"capacity_factor": 1.0}, {"capacity_factor": 1.0, "pad_to_capacity": True}], ids=str)
def test_tokens_permuted_by_fused_kernels_equal_those_permuted_by_torch(run, tmp_path, change):
    fused, plain = (gpu.train(run, TE, at(tmp_path, str(flag)), {"model": {"moe": {**MOE, **change, "permute_fusion": flag}}}) for flag in (True, False))
    np.testing.assert_allclose(losses(fused), losses(plain), rtol=5e-3)


@needs_te
def test_documents_of_te_equal_the_masks_of_torch_and_are_not_ignored(run, start, tmp_path):
    te, torch, whole = (
        gpu.train(run, start, at(tmp_path, name), {"train": {"backend": backend}, "data": {"reset_at_eod": documents}})
        for name, backend, documents in (("te", "te", True), ("torch", "torch", True), ("whole", "te", False)))
    np.testing.assert_allclose(losses(te), losses(torch), rtol=1e-2)
    assert np.abs(losses(te) - losses(whole)).max() > 3 * np.abs(losses(te) - losses(torch)).max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(run, tmp_path, backend, recompute):
    kept, again = (gpu.train(run, at(tmp_path, name), {"train": {"backend": backend, "recompute": name}}) for name in ("none", recompute))
    np.testing.assert_allclose(losses(again), losses(kept), rtol=1e-3)


@needs_te
@pytest.mark.parametrize("change", [{}, {"parallel": {"zero1": True}}, {"train": {"fp8": {"recipe": "tensorwise"}}}, {"train": {"global_batch": 16}}], ids=str)
def test_cuda_graphs_change_nothing(run, one_epoch, tmp_path, change):
    """Twelve steps of several micro-batches, validation in between; the first step records. Then it goes on from a checkpoint."""
    plain = {"data": {**one_epoch["data"], "reset_at_eod": False}, "train": {"steps": 12, "micro_batch": 2, "eval_every": 4, "eval_samples": 4}}
    if change.get("train", {}).get("fp8") and CAPABILITY < (8, 9):
        pytest.skip("FP8 needs compute capability (8, 9) or more")
    eager, graphs = (gpu.train(run, TE, plain, change, at(tmp_path, str(flag)), {"train": {"cuda_graphs": flag}}) for flag in (False, True))
    np.testing.assert_allclose(losses(graphs), losses(eager), rtol=1e-3)
    gpu.train(run, TE, plain, change, at(tmp_path, "broken"), {"train": {"cuda_graphs": True, "steps": 6}, "schedule": {"decay_steps": 12}})
    again = gpu.train(run, TE, plain, change, at(tmp_path, "broken"), {"train": {"cuda_graphs": True}})
    np.testing.assert_allclose(losses(again), losses(eager), rtol=1e-3)


# --- FP8 -------------------------------------------------------------------------------------------------------------------


def falls(lines) -> bool:
    found = losses(lines)
    return len(found) == 20 and np.isfinite(found).all() and found[-5:].mean() < found[:5].mean() - 0.2


@pytest.mark.parametrize("model", [{}, {"moe": MOE}, LATENT_MOE], ids=["dense", "moe", "latent"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_fp8_recipe_trains(run, recipe, model):
    assert falls(gpu.train(run, TE, {"model": model, "optim": {"lr": 3e-3}, "train": {"steps": 20, "fp8": {"recipe": recipe}}}))


@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_fp8_parameters_train_and_resume(run, one_epoch, tmp_path, recipe):
    """Master weights come from the exact initial values: the first loss is near that of bf16."""
    calm = merged(one_epoch, {"optim": {"lr": 3e-3}})
    params = merged(TE, calm, {"train": {"steps": 20, "fp8": {"recipe": recipe, "params": True}}, "parallel": {"zero1": True}})
    plain = gpu.train(run, TE, calm, at(tmp_path, "bf16"), {"train": {"steps": 20}})
    whole = gpu.train(run, params, at(tmp_path, "whole"))
    assert abs(whole[0]["loss"] - plain[0]["loss"]) < 0.05
    np.testing.assert_allclose(losses(whole), losses(plain), rtol=0.1)  # nothing is read twice, so both fall but little
    gpu.train(run, params, at(tmp_path, "broken"), {"train": {"steps": 10}, "schedule": {"decay_steps": 20}})
    np.testing.assert_allclose(losses(gpu.train(run, params, at(tmp_path, "broken"))), losses(whole), rtol=2e-2)


# --- saving and resuming -----------------------------------------------------------------------------------------------------


VARIANTS = {
    "torch": {},
    "te": TE,
    "te zero1": merged(TE, {"parallel": {"zero1": True}}),
    "te precision aware": merged(TE, {"parallel": {"zero1": True}, "optim": {"precision_aware": True}}),
    "te moe": merged(TE, {"model": {"moe": MOE}}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_te) if "te " in f"{name} " else name for name in VARIANTS])
def test_resuming_is_bit_equal(run, tmp_path, name):
    variant = merged(VARIANTS[name], {"run": {"deterministic": True}})
    _resumes(run, variant, tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resuming_fp8_is_bit_equal(run, tmp_path, recipe):
    """Delayed scaling carries its history in the checkpoint."""
    _resumes(run, merged(TE, {"run": {"deterministic": True}, "train": {"fp8": {"recipe": recipe}}}), tmp_path)


def _resumes(run, variant, tmp_path):
    whole = gpu.train(run, variant, at(tmp_path, "whole"))
    gpu.train(run, variant, at(tmp_path, "broken"), {"train": {"steps": 3}, "schedule": {"decay_steps": 6}})
    assert numbers(gpu.train(run, variant, at(tmp_path, "broken"))) == numbers(whole)


@needs_te
def test_a_checkpoint_of_a_gpu_goes_on_anywhere(run, tmp_path):
    """Three steps of te on a GPU, then three of plain layers on a CPU, beside six of te."""
    whole = gpu.train(run, TE, at(tmp_path, "whole"))
    gpu.train(run, TE, at(tmp_path, "moving"), {"train": {"steps": 3}, "schedule": {"decay_steps": 6}})
    moved = gpu.train(run, at(tmp_path, "moving"), device="cpu")
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=2e-2)


@needs_te
def test_documents_of_te_equal_the_masks_of_torch_in_latent_attention(run, tmp_path):
    """Keys are wider than values there. From a step of a CPU, as checkpoints move from the torch layers to te's."""
    model = {"model": LATENT}
    gpu.train(run, model, at(tmp_path, "start"), {"train": {"precision": "fp32", "steps": 1}, "schedule": {"decay_steps": 6}}, device="cpu")
    start = {"checkpoint": {"load": str(tmp_path / "start"), "load_optimizer": False}, "data": {"reset_at_eod": True}}
    te, torch = (gpu.train(run, model, start, at(tmp_path, backend), {"train": {"backend": backend}}) for backend in ("te", "torch"))
    np.testing.assert_allclose(losses(te), losses(torch), rtol=1e-2)


# --- several GPUs --------------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "dp": {},
    "zero1 overlap": {"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp sp": {"tp": 2, "sequence_parallel": True},
    "pp": {"pp": 2},
    "vpp": {"pp": 2, "vpp": 2},
}


@needs_two
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gpus_equal_one(run, tmp_path, backend, layout):
    shape = {"model": {"num_layers": 4}, "train": {"backend": backend}}
    one = gpu.train(run, shape, at(tmp_path, "one"))
    two = gpu.train(run, shape, at(tmp_path, "two"), {"parallel": layout}, num_ranks=2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-2)


@needs_two
@needs_te
@pytest.mark.parametrize("recipe", ["none", *RECIPES[:2]])
def test_overlapped_tensor_parallel_communication_changes_nothing(run, tmp_path, recipe):
    layout = {"parallel": {"tp": 2, "sequence_parallel": True}, "train": {"fp8": {"recipe": recipe}}}
    plain, overlapped = (gpu.train(run, TE, layout, at(tmp_path, str(flag)), {"parallel": {"tp_comm_overlap": flag}}, num_ranks=2)
                         for flag in (False, True))
    np.testing.assert_allclose(losses(overlapped), losses(plain), rtol=1e-2)


@needs_two
@needs_te
def test_context_parallel_by_te_equals_one_gpu(run, tmp_path):
    """Without document masks, which te does not take there."""
    plain = {"data": {"reset_at_eod": False}}
    one = gpu.train(run, TE, plain, at(tmp_path, "one"))
    two = gpu.train(run, TE, plain, at(tmp_path, "two"), {"parallel": {"cp": 2}}, num_ranks=2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-2)


@needs_two
@needs_te
@pytest.mark.parametrize("layout", [{"tp": 2, "sequence_parallel": True, "etp": 1, "ep": 2}, {"cp": 2}], ids=["tp sp ep", "cp"])
def test_latent_attention_of_te_split_over_two_gpus_equals_one(run, tmp_path, layout):
    """The gradient norm counts projections that are whole on both ranks once."""
    plain = {"data": {"reset_at_eod": False}, "model": LATENT_MOE}
    one = gpu.train(run, TE, plain, at(tmp_path, "one"))
    two = gpu.train(run, TE, plain, at(tmp_path, "two"), {"parallel": layout}, num_ranks=2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-2)
    np.testing.assert_allclose([line["grad_norm"] for line in two], [line["grad_norm"] for line in one], rtol=2e-2)


@needs_two
@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_fp8_parameters_split_over_two_gpus(run, tmp_path, recipe):
    params = merged(TE, {"train": {"steps": 20, "fp8": {"recipe": recipe, "params": True}},
                         "parallel": {"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True}})
    assert falls(gpu.train(run, params, at(tmp_path, "run"), num_ranks=2))

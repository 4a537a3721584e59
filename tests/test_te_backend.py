"""The te layer backend as far as a machine without a GPU can show it.

A stand-in for Transformer Engine in plain torch (te_stub.py) runs megatron's own wrappers of it: layers, packed documents, fused
weight gradients, checkpoints. Beside it: what megatron is told for each switch, and what is refused; and where Transformer Engine itself is
installed its own modules, built and saved (te_modules.py).
Left out: FP8 numbers and every kernel, which tests/gpu runs on a GPU.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import parity_table
import pytest
import te_stub
import torch
from training import merged

from engine import mcore
from engine.config import validate
from engine.mcore import build, optim_state, quantized, spec_te, topology, tp_overlap

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
TE = {"run": {"device": "auto"}, "train": {"backend": "te", "precision": "bf16"}}


@pytest.fixture(scope="module")
def runs():
    """What te_stub.py's runs reported."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("te_stub.py"))], capture_output=True, text=True, timeout=400)
    assert not done.returncode, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(ours, theirs) -> float:
    return max(abs(a - b) / abs(b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True))


@pytest.mark.parametrize("model", ["dense", "tied", "tied-mtp", "window", "post", "gpt2", "moe-mixed", "moe-both", *te_stub.VARIED])
def test_te_equals_torch_from_the_same_seed(runs, model):
    """Losses and gradient norms of four AdamW steps; initial weights are drawn by name, so they too must be the same."""
    assert largest_difference(runs[model]["te"], runs[model]["torch"]) < 1e-6


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_latent_attention_changes_nothing(runs, how):
    assert runs["latent recomputed"][how] == runs["latent recomputed"]["none"]


@pytest.mark.parametrize("model", ["latent yarn", "gemma without caps", "moe-sinks"])
def test_answers_are_drawn_with_the_scale_the_angles_and_the_sinks_of_training(runs, model):
    """te's attention is not the one that draws."""
    assert largest_difference(runs["answers"][model]["te"], runs["answers"][model]["torch"]) < 1e-6


def test_tokens_are_permuted_by_fused_kernels_unless_told_otherwise(runs):
    assert runs["permuted"] == ["permute", "sort_chunks", "unpermute"]
    assert runs["permuted plainly"]["fused"] == []
    assert largest_difference(runs["permuted plainly"]["losses"], runs["moe-mixed"]["te"]) < 1e-6


@pytest.mark.parametrize("kind", ["te to torch", "torch to te", "latent te to torch", "latent torch to te", "sinks te to torch", "sinks torch to te"])
def test_checkpoints_move_between_backends(runs, kind):
    assert largest_difference(runs["moved"][kind]["broken"], runs["moved"][kind]["unbroken"]) < 1e-6


@pytest.mark.parametrize("kind", ["zero1", "precision aware", "untrained", "untrained precision aware"])
def test_resuming_with_fused_adam_is_bit_equal(runs, kind):
    assert runs["moved"][kind]["broken"] == runs["moved"][kind]["unbroken"]


def test_documents_reach_attention_packed_and_whole_sequences_do_not(runs):
    assert runs["formats"] == [["sbhd", "causal"], ["thd", "padding_causal"]]


def test_each_layer_is_made_of_the_fused_modules(runs):
    attention = {"input_layernorm": "IdentityOp", "self_attention.linear_qkv": "TELayerNormColumnParallelLinear", "self_attention.q_layernorm": "RMSNorm",
                 "self_attention.core_attention": "TEDotProductAttention", "self_attention.linear_proj": "TERowParallelLinear"}
    dense = {**attention, "pre_mlp_layernorm": "IdentityOp", "mlp": "MLP", "mlp.linear_fc1": "TELayerNormColumnParallelLinear"}
    moe = {**attention, "pre_mlp_layernorm": "RMSNorm", "mlp": "MoELayer", "mlp.experts": "TEGroupedMLP",
           "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear"}
    assert runs["layers"] == [dense, moe, moe, moe]


def test_latent_attention_is_made_of_te_modules(runs):
    linear = {"linear_q_down_proj": "Whole", "linear_q_up_proj": "TEColumnParallelLinear", "linear_kv_down_proj": "Whole",
              "linear_kv_up_proj": "TEColumnParallelLinear", "linear_proj": "TERowParallelLinear", "core_attention": "LatentCore",
              "q_layernorm": "RMSNorm", "kv_layernorm": "RMSNorm"}
    for layer in runs["latent layers"]:
        assert {name.removeprefix("self_attention."): kind for name, kind in layer.items() if name.startswith("self_attention.")} == linear
        assert layer["input_layernorm"] == "RMSNorm"
    assert runs["latent layers"][-1]["mlp.experts"] == "TEGroupedMLP"


def test_what_is_whole_on_every_tp_rank_counts_once_in_the_norm_and_what_is_split_on_all(runs):
    """Transformer Engine marks all weights as split over tp, and no sinks."""
    assert runs["split over tp"] == ["linear_kv_up_proj.weight", "linear_proj.weight", "linear_q_up_proj.weight",
                                     "core_attention.softmax_offset", "linear_proj.weight", "linear_qkv.bias", "linear_qkv.weight"]


def test_fp8_states_are_saved_and_read(runs):
    assert runs["fp8 state"] == [[0, 0, 0], True]


def test_megatron_is_whole_on_a_gpu_without_transformer_engine():
    """Its mixtures name a function that is then missing. Told that there is a GPU, the package prepares the import that a GPU process gets."""
    code = ("import torch; torch.cuda.is_available = lambda: True\nimport engine.mcore\n"
            "from megatron.core.transformer.moe import moe_utils\nprint(engine.mcore.te_problem, moe_utils.te_general_gemm)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "Transformer Engine is not installed None\n", done.stderr[-2000:]


@pytest.mark.skipif(not list(distributions(name="transformer-engine-torch")), reason="Transformer Engine is not installed (docs/gpu.md)")
def test_its_own_modules_are_built_and_saved():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("te_modules.py"))], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert not done.returncode, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["read by torch"].values()) == set(found["read by torch, of FP8"].values()) == {True}, found
    assert len(found["read by torch"]) > 20 and len(found["read by torch, of FP8"]) == 9 and found["delayed state"]


# --- documents end to end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_document_bounds_against_a_loop(seed):
    lengths = torch.randint(1, 9, (int(torch.randint(1, 7, (), generator=torch.Generator().manual_seed(seed))),),
                            generator=torch.Generator().manual_seed(seed)).tolist()
    ids = [number + 5 for number, length in enumerate(lengths) for _ in range(length)]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    found = spec_te.document_bounds(torch.tensor([ids], dtype=torch.int32))
    assert found["cu_seqlens"].tolist() == bounds and found["cu_seqlens"].dtype == torch.int32
    assert int(found["max_document"]) == max(lengths) and found["max_document"].dim() == 0


def test_attention_inputs_are_plain_causal_without_documents():
    assert spec_te.attention_inputs({"tokens": torch.zeros(1, 4)}) == {"attention_mask": None}
    packed = spec_te.attention_inputs(spec_te.document_bounds(torch.tensor([[1, 1, 2]])))["packed_seq_params"]
    assert (packed.qkv_format, packed.max_seqlen_q, packed.max_seqlen_kv) == ("thd", 2, 2) and type(packed.max_seqlen_q) is int
    assert packed.cu_seqlens_q is packed.cu_seqlens_kv and packed.cu_seqlens_q.tolist() == [0, 2, 3] and packed.cu_seqlens_q_padded is None


# --- what megatron is told -----------------------------------------------------------------------------------------------


@pytest.fixture
def with_te(monkeypatch):
    """Transformer Engine as good as there, for code that only fills megatron's configurations."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setattr(build, "te_problem", "")
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    for name in ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute"):
        monkeypatch.setattr(moe_utils, f"fused_{name}", object(), raising=False)
    monkeypatch.setattr("megatron.core.transformer.transformer_config.is_te_min_version", lambda *_: True)


def te_run(*changes):
    base = parity_table.config("moe", {}, {}, 1).model_dump()
    return validate(merged(base, TE, *changes))


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_in_megatrons_terms(with_te, recipe):
    config = build.transformer_config(te_run({"train": {"fp8": {"recipe": recipe, "amax_history": 16}}}), "cuda")
    from megatron.core.enums import Fp8Recipe

    assert config.fp8 == "hybrid" and config.fp8_recipe == Fp8Recipe(recipe) and not config.fp8_param
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo, config.fp8_margin) == (16, "max", 0)
    assert config.bf16 and config.params_dtype == torch.bfloat16
    assert config.gradient_accumulation_fusion and config.apply_rope_fusion and config.moe_grouped_gemm and not config.use_te_activation_func


def test_cuda_graphs_record_whole_layers_of_a_network_that_learns(with_te):
    run = validate(merged(parity_table.config("dense", {}, {}, 1).model_dump(), TE, {"train": {"cuda_graphs": True}, "data": {"reset_at_eod": False}}))
    config = build.transformer_config(run, "cuda")
    assert (config.cuda_graph_impl, config.cuda_graph_scope) == ("local", [])
    assert build.transformer_config(te_run(), "cuda").cuda_graph_impl == "none"
    assert build.transformer_config(build.for_role(run, False, "tokens"), "cuda").cuda_graph_impl == "none"
    assert build.transformer_config(build.one_rank(run), "cpu").cuda_graph_impl == "none"
    with pytest.raises(ValueError, match="train.cuda_graphs needs Transformer Engine, but there is no GPU"):
        build.transformer_config(run.model_copy(update={"train": run.train.model_copy(update={"backend": "auto"})}), "cpu")


def test_a_checkpoint_holds_the_states_of_generators(monkeypatch):
    """What megatron tracks for graphs are generators, which no checkpoint may hold; they come back as generators."""
    from megatron.core import tensor_parallel

    from engine.mcore import checkpoint, topology

    topology.start_single()
    generator = torch.Generator().manual_seed(5)
    kept = {}
    tracker = SimpleNamespace(use_cudagraphable_rng=True, get_states=lambda: {"mine": generator}, set_states=kept.update)
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    place = SimpleNamespace(device="cpu", pp_rank=0, pp=1, tp_rank=0, tp=1)
    state = checkpoint._random_state(place).data
    assert torch.equal(state["tracker"]["mine"], generator.get_state())
    asked = []
    monkeypatch.setattr("megatron.core.tensor_parallel.random.convert_cuda_rng_state", lambda state, to_graphable: asked.append(to_graphable) or generator)
    checkpoint._restore_random(state, "cpu")
    assert kept == {"mine": generator} and asked == [True]


def test_without_fp8_megatron_hears_of_none(with_te):
    config = build.transformer_config(te_run(), "cuda")
    assert config.fp8 is None and not config.fp8_param and config.init_method is build._leave


def test_grouped_experts_with_biases_get_no_dropout_fusion(with_te):
    shape = {"model": {"linear_bias": True, "moe": {"shared_expert_ffn_hidden_size": 0}}}
    assert not build.transformer_config(te_run(shape), "cuda").bias_dropout_fusion
    assert build.transformer_config(te_run(), "cuda").bias_dropout_fusion


def test_fused_permutation_has_a_switch(with_te):
    assert build.transformer_config(te_run(), "cuda").moe_permute_fusion
    assert not build.transformer_config(te_run({"model": {"moe": {"permute_fusion": False}}}), "cuda").moe_permute_fusion
    assert not build.transformer_config(te_run({"train": {"backend": "torch"}}), "cuda").moe_permute_fusion


def test_a_sliding_window_under_cp_gathers_instead_of_the_ring(with_te):
    layout = {"parallel": {"cp": 2}}
    assert build.transformer_config(te_run(layout), "cuda").cp_comm_type == "p2p"
    assert build.transformer_config(te_run(layout, {"model": {"sliding_window": 8}}), "cuda").cp_comm_type == "all_gather"


@pytest.fixture
def told(monkeypatch, with_te):
    """told(*changes) -> what build hands to megatron's DDP and optimizer configurations."""
    def told(*changes):
        heard = {}

        def recorder(name):
            known = {field.name for field in dataclasses.fields(getattr(build, name))}

            def record(*args, **kwargs):
                assert not args and kwargs.keys() <= known, kwargs.keys() - known
                heard[name] = SimpleNamespace(**kwargs)
                return heard[name]
            return record

        chunk = SimpleNamespace(no_sync="no_sync", start_grad_sync="grads", start_param_sync="params")
        for name in ("DistributedDataParallelConfig", "OptimizerConfig"):
            monkeypatch.setattr(build, name, recorder(name))
        monkeypatch.setattr(build, "build_chunk", lambda *_: SimpleNamespace(named_parameters=lambda: ()))
        monkeypatch.setattr(build, "DistributedDataParallel", lambda config, *_, **__: heard.update(config=config) or chunk)
        monkeypatch.setattr(build, "get_megatron_optimizer", lambda *_, **__: SimpleNamespace(chained_optimizers=[], param_groups=[]))
        run = te_run(*changes)
        build.build_optimizer(run, build.build_model(run, "cuda"))
        monkeypatch.undo()
        return heard["config"], heard["DistributedDataParallelConfig"], heard["OptimizerConfig"]
    return told


def test_fp8_parameters_are_gathered_in_fp8_and_start_finite(told):
    config, ddp, optimizer = told({"train": {"fp8": {"recipe": "blockwise", "params": True}}, "parallel": {"zero1": True}})
    assert config.fp8_param and ddp.fp8_param_gather and optimizer.fp8_recipe == "blockwise"
    assert torch.equal(config.init_method(torch.full((2,), float("nan"))), torch.zeros(2))


def test_fp8_products_with_plain_parameters_leave_the_optimizer_alone(told):
    config, ddp, optimizer = told({"train": {"fp8": {"recipe": "blockwise"}}, "parallel": {"zero1": True}})
    assert not ddp.fp8_param_gather and optimizer.fp8_recipe is None and ddp.grad_reduce_in_fp32


def test_precision_aware_means_bf16_gradients_and_moments_and_whole_masters(told):
    _, ddp, optimizer = told({"optim": {"precision_aware": True}, "parallel": {"zero1": True}})
    assert not ddp.grad_reduce_in_fp32 and optimizer.use_precision_aware_optimizer and not optimizer.store_param_remainders
    assert {optimizer.main_grads_dtype, optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype} == {torch.bfloat16}
    assert not hasattr(optimizer, "main_params_dtype")  # fp32, megatron's default


@pytest.mark.parametrize("layout, aligned", [({"pp": 2, "vpp": 2}, True), ({"pp": 2}, False)])
def test_gathers_are_aligned_where_the_schedule_starts_them(told, layout, aligned):
    overlap = {"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    config, ddp, _ = told({"parallel": {**layout, **overlap}})
    assert ddp.align_param_gather == aligned
    assert config.param_sync_func == (["params", "params"] if aligned else None)


def test_buffers_of_tp_comm_overlap(monkeypatch):
    """The arguments of Transformer Engine's initialize_ub (2.7 and later)."""
    calls = []
    base = SimpleNamespace(UserBufferQuantizationMode=SimpleNamespace(NONE="none", FP8="fp8"), initialize_ub=lambda **kwargs: calls.append(kwargs), destroy_ub=lambda: calls.append("destroyed"))
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", SimpleNamespace(base=base))
    monkeypatch.setattr(tp_overlap, "_size", [])
    layout = {"parallel": {"tp": 2, "sequence_parallel": True, "cp": 2, "tp_comm_overlap": True}, "train": {"micro_batch": 2}}
    for _ in range(2):  # a second network uses the buffers of the first
        tp_overlap.start(te_run(layout, {"train": {"fp8": {"recipe": "tensorwise"}}}))
    assert calls == [dict(shape=[64, 64], tp_size=2, quantization_modes=["fp8"], dtype=torch.bfloat16, bootstrap_backend="nccl")]
    for _ in range(2):
        tp_overlap.stop()
    assert calls[1:] == ["destroyed"] and tp_overlap._size == []


# --- FP8 parameters --------------------------------------------------------------------------------------------------------


class Eighths(torch.nn.Parameter):
    """Stands for an FP8 parameter: holds multiples of 1/8, and remembers beside them the value it was made from."""

    def get_high_precision_init_val(self):
        return self.__dict__.setdefault("before", torch.full_like(self.data, float("nan")))

    def copy_(self, values):
        self.data.copy_((values * 8).round() / 8)
        return self


def test_fp8_parameters_are_filled_whole_and_leave_their_exact_value_for_the_master(monkeypatch):
    """The gate and up halves of fc1 are drawn as one key each through views, which an FP8 parameter cannot lend."""
    from engine.mcore import topology

    topology.start_single()
    run = build.one_rank(parity_table.config("dense", {}, {}, 1))
    plain, other = (build.build_chunk(run, build.transformer_config(run, "cpu"), "cpu") for _ in range(2))
    monkeypatch.setattr(quantized, "is_float8tensor", lambda parameter: isinstance(parameter, Eighths))
    for layer in other.decoder.layers:
        layer.mlp.linear_fc1.weight = Eighths(torch.full_like(layer.mlp.linear_fc1.weight, 100.0))
    build.init_weights(other, run)
    for (name, parameter), value in zip(other.named_parameters(), plain.parameters(), strict=True):
        if "linear_fc1" in name:
            assert isinstance(parameter, Eighths) and torch.equal(parameter.get_high_precision_init_val(), value)
            assert torch.equal(parameter.data, (value * 8).round() / 8)
        else:
            assert torch.equal(parameter, value)


# --- refusals --------------------------------------------------------------------------------------------------------------


def test_a_cpu_has_no_te_backend():
    with pytest.raises(ValueError, match="train.backend=te, but there is no GPU; set train.backend=torch"):
        build.backend_of(te_run(), "cpu")
    assert build.backend_of(te_run({"train": {"backend": "auto"}}), "cpu") == "torch"


@pytest.mark.parametrize("change, told", [
    ({"train": {"fp8": {"recipe": "delayed"}}}, "train.fp8.recipe=delayed needs Transformer Engine, but there is no GPU; set it to none"),
    ({"parallel": {"tp": 2, "sequence_parallel": True, "tp_comm_overlap": True}}, "parallel.tp_comm_overlap needs Transformer Engine, but there is no GPU"),
])
def test_switches_of_te_are_not_dropped_silently(change, told):
    with pytest.raises(ValueError, match=told):
        build.backend_of(te_run({"train": {"backend": "auto"}}, change), "cpu")


def test_precision_aware_needs_its_optimizer():
    with pytest.raises(ValueError, match="optim.precision_aware needs Transformer Engine's optimizer, but there is no GPU; set it to false"):
        build.build_optimizer(te_run({"optim": {"precision_aware": True}, "parallel": {"zero1": True}}), [])


def test_documents_want_one_sample_per_micro_batch_and_no_cp():
    documents = {"data": {"reset_at_eod": True, "eod_id": 7}}
    spec_te.check(te_run(documents))
    with pytest.raises(ValueError, match="document masks with train.micro_batch=1, not 2"):
        spec_te.check(te_run(documents, {"train": {"micro_batch": 2}}))
    with pytest.raises(ValueError, match=r"no document masks under context parallel \(parallel.cp=2\)"):
        spec_te.check(te_run(documents, {"parallel": {"cp": 2}}))


def sft_run(*changes):
    base = parity_table.config("dense", {}, {}, 1).model_dump()
    sft = {"stage": "sft", "data": {"reset_at_eod": False, "train": ["a.jsonl"], "valid": {}}, "train": {"micro_batch": 1}}
    return validate(merged(base, TE, sft, *changes))


def test_packed_conversations_are_documents_too():
    spec_te.check(sft_run())
    with pytest.raises(ValueError, match=r"document masks with train.micro_batch=1, not 2: .*chat.pack=false"):
        spec_te.check(sft_run({"train": {"micro_batch": 2}}))
    with pytest.raises(ValueError, match=r"no document masks under context parallel \(parallel.cp=2\); set cp=1, chat.pack=false, or"):
        spec_te.check(sft_run({"parallel": {"cp": 2}}))
    spec_te.check(sft_run({"chat": {"pack": False}, "train": {"micro_batch": 2}, "parallel": {"cp": 2}}))


def test_documents_of_several_rows_are_refused():
    """Of a stage of one's own, which no check of the configuration knows."""
    with pytest.raises(ValueError, match="documents of one row, not of 2; set train.micro_batch=1"):
        spec_te.document_bounds(torch.zeros(2, 4, dtype=torch.int32))


def test_fp32_wants_no_cp():
    spec_te.check(te_run({"train": {"precision": "fp32"}}))
    with pytest.raises(ValueError, match=r"no attention in fp32 under context parallel \(parallel.cp=2\); set train.precision=bf16"):
        spec_te.check(te_run({"train": {"precision": "fp32"}, "parallel": {"cp": 2}}))


@pytest.mark.parametrize("recipe, multiple", [("none", 16), ("tensorwise", 64), ("mxfp8", 128)])
def test_trimmed_batches_suit_fp8(recipe, multiple):
    """Tokens of each rank in multiples of 16 (32 for mxfp8), of two cp and two tp ranks; without FP8 what the split wants."""
    run = SimpleNamespace(parallel=SimpleNamespace(sequence_parallel=True), train=SimpleNamespace(fp8=SimpleNamespace(recipe=recipe)))
    assert topology.Topology.sequence_multiple(SimpleNamespace(cp=2, tp=2), run) == multiple


def test_sinks_want_no_cp():
    spec_te.check(te_run({"model": {"attention_sinks": True}}))
    with pytest.raises(ValueError, match=r"no model.attention_sinks under context parallel \(parallel.cp=2\), whose ring knows none; set cp=1, or "):
        spec_te.check(te_run({"model": {"attention_sinks": True}, "parallel": {"cp": 2}}))


@pytest.mark.parametrize("recipe, question", [("delayed", "is_fp8_available"), ("mxfp8", "is_mxfp8_available")])
def test_a_recipe_that_this_gpu_cannot_run(monkeypatch, recipe, question):
    te = SimpleNamespace(**{question: lambda return_reason: (False, "Device compute capability is too low.")})
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=te))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)
    with pytest.raises(ValueError, match=f"train.fp8.recipe={recipe} does not run on this GPU: Device compute capability is too low.; choose"):
        spec_te.check(te_run({"train": {"fp8": {"recipe": recipe}}}))


@pytest.mark.parametrize("body, told", [
    ("raise RuntimeError('libcudnn is missing')", r"Transformer Engine cannot be imported \(RuntimeError: libcudnn is missing\)"),
    (None, r"Transformer Engine cannot be imported \(ModuleNotFoundError: No module named 'transformer_engine.pytorch'\)"),
    ("", ""),
])
def test_half_of_transformer_engine_is_treated_as_none(monkeypatch, tmp_path, body, told):
    """megatron takes the core package alone, or one that raises, for all of it and fails in its own import."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    if body is not None:
        (package / "pytorch.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    sys.modules.pop("transformer_engine", None)
    problem = mcore.check_transformer_engine()
    assert re.fullmatch(told, problem)
    assert (sys.modules["transformer_engine"] is None) == bool(told)
    if told:
        with pytest.raises(ImportError):
            import transformer_engine  # noqa: F401


def test_without_it_the_answer_is_not_installed(monkeypatch):
    monkeypatch.setattr(mcore.importlib.util, "find_spec", lambda name: None)
    assert mcore.check_transformer_engine() == "Transformer Engine is not installed"


# --- optimizer and environment ---------------------------------------------------------------------------------------------


def test_moments_are_made_once_and_torchs_adam_is_left_alone():
    class Lazy(torch.optim.SGD):
        def initialize_state(self, parameter, store_param_remainders):
            assert store_param_remainders is False
            self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)

    weight = torch.nn.Parameter(torch.ones(3))
    lazy, eager = Lazy([weight], lr=1.0), torch.optim.AdamW([weight])
    optim_state._make_moments(lazy)
    made = lazy.state[weight]["exp_avg"]
    optim_state._make_moments(lazy)
    optim_state._make_moments(eager)
    assert lazy.state[weight]["exp_avg"] is made and not eager.state


def test_a_cpu_run_is_refused_where_megatron_has_taken_te(monkeypatch):
    from engine.mcore import topology

    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace())
    with pytest.raises(ValueError, match="hide the GPU: CUDA_VISIBLE_DEVICES="):
        topology.start(parity_table.config("dense", {}, {}, 1))


def test_generators_of_another_device_are_not_restored():
    from engine.mcore import checkpoint

    before = torch.get_rng_state()
    checkpoint._restore_random({"torch": before.flip(0), "cuda": torch.zeros(16, dtype=torch.uint8), "tracker": {}}, "cpu")
    assert torch.equal(torch.get_rng_state(), before)

"""The planner: its bytes beside those that CPU ranks allocate and save, its search, and what launch/plan.py says."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import parity_table
import planner_probe
import pytest
import ranks
from engine import metrics
from engine.config import ConfigError, load_config, validate
from engine.loss_memory import BLOCK_BYTES
from engine.planner import budget
from engine.planner.activations import Saved
from engine.planner.cluster import GPUS, kind_of, larger, make_cluster
from engine.planner.constants import GIB
from engine.planner.memory import fullest, in_flight, memory_of
from engine.planner.report import gib
from engine.planner.search import own_layout, read, search, write
from engine.planner.time import Dispatch, step_time
from engine.planner.weights import chunks, spread, weights, worth_of_output
from engine.stage import Stage
from engine.stages import STAGES, build_stage

ROOT = Path(__file__).parents[1]
LLAMA8B = str(ROOT / "examples/llama3_8b/pretrain.yaml")
DEEPSEEK = str(ROOT / "examples/deepseek_v3/pretrain.yaml")


def raw(model: dict, layout: dict, train: dict, **sections) -> dict:
    return {"run": {"dir": "unused", "device": "cpu"}, "model": model, "parallel": layout, "data": {"train": ["unused"]},
            "train": {"seq_len": 64, "global_batch": 8, "steps": 1, "precision": "fp32", **train}, **sections}


# --- weights, gradients, optimizer: to the byte ---------------------------------------------------------------------------

LORA = {"lora": {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}}
ALL_LORA = {"lora": {"rank": 4, "dora": True, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}}
BF16 = {"precision": "bf16"}
SP = dict(sequence_parallel=True)
MTP = {**parity_table.DENSE, "mtp": dict(num_layers=2)}
KEPT = dict(num_layers=1, loss_weight=0)      # modules for further tokens that have no loss
FURTHER = [      # beside the layouts of the parity table: precisions, adapters, a scalar head
    (1, raw(parity_table.DENSE, {}, BF16)),
    (1, raw(parity_table.DENSE, {}, {}, **LORA)),
    (1, raw({**parity_table.DENSE, "head": "scalar"}, {}, {})),
    (2, raw(parity_table.DENSE, dict(zero1=True), BF16)),
    (2, raw(parity_table.MODELS["tied"], dict(pp=2, zero1=True), BF16)),
    (2, raw(parity_table.DENSE, dict(tp=2, **SP), BF16, **ALL_LORA)),
    (2, raw(parity_table.MOE, dict(tp=2, **SP, etp=1, ep=2, zero1=True), BF16, **ALL_LORA)),
    (2, raw(parity_table.MODELS["latent-moe"], dict(ep=2, zero1=True), BF16)),
    (2, raw(MTP, dict(pp=2, vpp=2, zero1=True), BF16)),      # an embedding of its own on the last rank
    (2, raw({**parity_table.MODELS["latent-moe"], "mtp": KEPT}, dict(pp=2, zero1=True), BF16)),
    (1, raw({**parity_table.DENSE, "mtp": KEPT}, {}, BF16, **LORA)),
    (4, raw(MTP, dict(tp=2, **SP, pp=2, zero1=True, overlap_grad_reduce=True), BF16)),
]


def of_parity_table(num_ranks: int):
    """One case of the parity table for each way of laying weights out; schedules, micro-batches, losses and recomputation do not change them."""
    found, like_others = {}, ("window", "moe-seq", "moe-global", "moe-bias", *(("dense",) if num_ranks == 8 else ()))      # eight are dear
    for row in parity_table.CASES:
        if row.ranks == num_ranks and row.model not in like_others:
            found.setdefault((row.model, str(row.layout)), raw(parity_table.MODELS[row.model], row.layout, {}))
    return list(found.values())


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_weights_gradients_and_optimizer_are_what_ranks_allocate(num_ranks):
    cases = of_parity_table(num_ranks) + [case for n, case in FURTHER if n == num_ranks]
    wrong = []
    for rank, measured in enumerate(ranks.run(num_ranks, planner_probe.kept, cases)):
        for case, (parameters, gradients, optimizer, places) in zip(cases, measured):
            said = weights(validate(case, num_ranks), num_ranks, *places)
            if (said.parameters, said.gradients, said.optimizer) != (parameters, gradients, optimizer):
                wrong.append((rank, case["model"]["family"], case["parallel"], said, (parameters, gradients, optimizer)))
    assert not wrong


# --- activations ----------------------------------------------------------------------------------------------------------

SIZES = dict(num_layers=2, hidden_size=128, ffn_hidden_size=320, num_attention_heads=8, vocab_size=500)
GQA = dict(family="llama", **SIZES, num_query_groups=2)
EXPERTS = dict(family="mixtral", **SIZES, moe=dict(num_experts=4, top_k=2, shared_expert_ffn_hidden_size=192))
LATENT = dict(family="deepseek_v3", **SIZES, mla=dict(q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16))
LATENT_EXPERTS = {**LATENT, "moe": dict(num_experts=8, top_k=2, ffn_hidden_size=64, shared_expert_ffn_hidden_size=64, first_dense_layers=1)}
TWO = {"seq_len": 128, "micro_batch": 2}
SAVED = [
    (1, raw(dict(family="llama", **SIZES), {}, TWO)),
    (1, raw({**GQA, "qk_norm": True}, {}, {**TWO, "micro_batch": 1, "precision": "bf16"})),
    (1, raw(dict(family="gpt2", **SIZES), {}, TWO)),
    (1, raw(dict(family="gemma2", **SIZES, head_dim=16), {}, TWO)),
    (1, raw(dict(family="gpt_oss", **SIZES, head_dim=16, sliding_window=32, rope_scaling=dict(kind="none"), moe=dict(num_experts=4, top_k=2)), {}, TWO)),
    (1, raw(LATENT, {}, TWO)),
    (1, raw(EXPERTS, {}, TWO)),
    (1, raw(GQA, {}, {**TWO, "recompute": "selective"})),
    (1, raw(LATENT, {}, {**TWO, "recompute": "selective"})),
    (1, raw(EXPERTS, {}, {**TWO, "recompute": "full"})),
    (2, raw(GQA, dict(tp=2), TWO)),
    (2, raw(GQA, dict(tp=2, **SP), TWO)),
    (2, raw(GQA, dict(tp=2, **SP), {**TWO, "recompute": "full"})),
    (2, raw(GQA, dict(cp=2), TWO)),
    (2, raw(GQA, dict(pp=2), {**TWO, "recompute": "selective"})),
    (2, raw(EXPERTS, dict(tp=2, **SP), TWO)),
    (2, raw(LATENT_EXPERTS, dict(tp=2, **SP, ep=2, etp=1), TWO)),
    (1, raw({**GQA, "mtp": dict(num_layers=2)}, {}, TWO)),
    (1, raw({**GQA, "mtp": KEPT}, {}, TWO)),
    (2, raw({**GQA, "mtp": dict(num_layers=2)}, dict(tp=2, **SP), TWO)),
    (2, raw({**GQA, "mtp": dict(num_layers=2)}, dict(tp=2), {**TWO, "recompute": "full"})),
    (2, raw({**LATENT_EXPERTS, "mtp": dict(num_layers=1)}, dict(pp=2), TWO)),
    (2, raw({**LATENT_EXPERTS, "mtp": dict(num_layers=1)}, dict(cp=2), {**TWO, "recompute": "selective"})),
]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_activations_are_what_autograd_saves(num_ranks):
    """The demand is 10%; what is found is below 0.2%, summed over ranks (experts are not evenly busy). The logits are exact."""
    cases = [case for n, case in SAVED if n == num_ranks]
    by_rank = ranks.run(num_ranks, planner_probe.saved, cases)
    for i, case in enumerate(cases):
        run = validate(case, num_ranks)
        model, said, measured = Saved(run, "torch", "cpu"), 0, 0
        for pp_rank, found in (results[i] for results in by_rank):
            for chunk, (kept, logits) in zip(chunks(run)[pp_rank], found):
                said, measured = said + model.chunk(chunk), measured + kept
                assert logits == (model.logits if chunk.is_last else 0)
        assert said == pytest.approx(measured, rel=0.002), case


def test_gradients_of_the_loss_made_early_are_counted(monkeypatch):
    """Instead of logits the gradient of the output matrix, once for next tokens and once for further ones."""
    case = raw({**GQA, "mtp": dict(num_layers=2)}, {}, {**TWO, "micro_batch": 8})
    block = 512 * 512 * 4      # of 1,024 tokens and 2,048 further ones, and a vocabulary padded to 512
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block)
    [[(_, [(_, measured)])]] = ranks.run(1, planner_probe.saved, [case], block)
    model = Saved(validate(case, 1), "torch", "cpu")
    assert measured == model.logits == 2 * 4 * 512 * 128 < 3 * 1024 * 512 * 4
    for name in STAGES:      # which of them say Stage.proportions is known to the planner without asking them
        says = type(build_stage(name)).proportions is not Stage.proportions
        found = Saved(model.run.model_copy(update={"stage": name}), "torch", "cpu").logits
        assert found == 4 * 512 * 128 + (4 * 512 * 128 if says else 1024 * 512 * 4), name      # further tokens' loss is the engine's own


def test_latent_attention_under_te_keeps_keys_and_values_of_their_own_sizes():
    run = validate(raw(LATENT, {}, {**TWO, "precision": "bf16"}), 1)
    tokens, heads, mla = run.train.seq_len * run.train.micro_batch, run.model.num_attention_heads, run.model.mla
    key = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    assert Saved(run, "te").core(False) == 2 * tokens * heads * (2 * key + 2 * mla.v_head_dim) + 4 * tokens * heads
    fp8 = run.model_copy(update={"train": run.train.model_copy(update={"fp8": run.train.fp8.model_copy(update={"recipe": "blockwise"})})})
    latents, h = mla.kv_lora_rank + mla.q_lora_rank, run.model.hidden_size
    more = Saved(run, "te").layer(False) - Saved(fp8, "te").layer(False)
    # Of one byte less: inputs of the four projections (two of them copies of one), of the MLP's two products; but for attention's output, kept twice.
    assert more == tokens * (latents + (h + run.model.ffn_hidden_size) - heads * mla.v_head_dim)


def test_a_full_pipeline_holds_what_its_schedule_says():
    assert [in_flight(4, 1, rank, 8) for rank in range(4)] == [[4], [3], [2], [1]]
    assert in_flight(4, 1, 0, 2) == [2]                     # no more than there are
    assert in_flight(4, 2, 0, 8) == [7, 4]                  # 2 * 3 + 4 passes of warm-up, and one: 4, 4, then 3 through the first chunk again
    assert in_flight(2, 4, 1, 100) == [2, 2, 2, 1]


# --- the search -------------------------------------------------------------------------------------------------------------


def test_every_layout_that_is_offered_passes_the_checks_and_fits(tmp_path):
    base, file, pins = read(LLAMA8B, [])
    cluster = make_cluster("h100", 16)
    answer = search(base, cluster, pins)
    assert answer.plans and answer.plans == sorted(answer.plans, key=lambda plan: plan.time.total)
    for plan in answer.plans[:20]:
        assert plan.memory.total <= cluster.gpu.memory_gib * GIB
        write(file, plan, str(tmp_path / "out.yaml"))
        written = load_config(tmp_path / "out.yaml", world_size=16)      # raises where it is not legal
        for field in ("micro_batch", "recompute"):
            assert getattr(written.train, field) == getattr(plan.run.train, field)
        assert written.parallel == plan.run.parallel
        assert written.optim == load_config(LLAMA8B).optim


def test_layers_that_do_not_divide_are_spread(tmp_path):
    base, file, pins = read(LLAMA8B, ["model.num_layers=31", "parallel.pp=4"])
    answer = search(base, make_cluster("h100", 16), pins)
    assert answer.plans and not answer.refused
    for plan in answer.plans[:5]:
        layers = plan.run.parallel.pp_layers
        assert len(layers) == 4 * plan.run.parallel.vpp and sum(layers) == 31
        assert layers in (spread(31, len(layers)), spread(31, len(layers), 2))      # the second where the output counts
        assert layers != spread(31, len(layers)) or layers[0] == min(layers) == max(layers) - 1
    write(file, answer.plans[0], str(tmp_path / "out.yaml"))
    assert load_config(tmp_path / "out.yaml", world_size=16).parallel == answer.plans[0].run.parallel


def test_modules_for_further_tokens_count_as_layers_of_the_last_chunk(tmp_path):
    assert spread(61, 16, 1) == [3, *[4] * 14, 2] and spread(31, 4, 1) == [8, 8, 8, 7] and spread(32, 4, 1) == [8, 8, 9, 7]
    assert spread(5, 4, 1) == spread(5, 4) == [1, 1, 2, 1] and spread(4, 4, 2) == [] and spread(7, 4, 3) == [2, 2, 2, 1]
    base, file, pins = read(DEEPSEEK, ["parallel.pp=16", "parallel.tp=2", "parallel.ep=64", "parallel.etp=1", "parallel.cp=1", "parallel.vpp=1"])
    answer = search(base, make_cluster("h100", 1024), pins)
    # one layer, or three, which its output, computed twice, is worth in bf16 FLOPs beside layers in FP8
    assert {tuple(plan.run.parallel.pp_layers) for plan in answer.plans} == {(3, *[4] * 14, 2), (*[4] * 15, 1)}
    write(file, answer.plans[0], str(tmp_path / "out.yaml"))
    assert load_config(tmp_path / "out.yaml", world_size=1024).parallel == answer.plans[0].run.parallel


def test_the_last_rank_has_fewer_layers_for_its_output():
    """Llama 3 8B: an output of 525 million parameters beside layers of 218, and their attention."""
    base, _, pins = read(LLAMA8B, ["parallel.pp=4", "parallel.vpp=1", "parallel.tp=1", "parallel.cp=1", "parallel.sequence_parallel=false"])
    assert worth_of_output(base.model, base.train.seq_len) == 2 and spread(32, 4, 2) == [8, 9, 9, 6]
    found = {tuple(plan.run.parallel.pp_layers): plan.time for plan in search(base, make_cluster("h100", 64), pins).plans}
    assert found.keys() == {(), (8, 9, 9, 6)} and found[8, 9, 9, 6].total < 0.95 * found[()].total
    reward = base.model.model_copy(update={"head": "scalar"})
    assert worth_of_output(reward, base.train.seq_len) == 0


def test_further_tokens_cost_what_their_flops_say():
    run = own_layout(read(LLAMA8B, ["parallel.tp=1", "parallel.sequence_parallel=false"])[1], make_cluster("h100", 8))[0].run
    deeper = run.model_copy(update={"model": run.model.model_copy(update={"mtp": run.model.mtp.model_copy(update={"num_layers": 2})})})
    kept = deeper.model_copy(update={"model": deeper.model.model_copy(update={"mtp": deeper.model.mtp.model_copy(update={"loss_weight": 0.0})})})
    spent, more, same = (step_time(one, make_cluster("h100", 8), "te") for one in (run, deeper, kept))
    flops, further = (metrics.flops_per_token(one.model, 0) for one in (run, deeper))      # without attention
    assert more.gemm / spent.gemm == pytest.approx(further / flops, rel=0.01)
    assert more.attention / spent.attention == pytest.approx(34 / 32) and same.gemm == spent.gemm


def test_overrides_fix_parts_of_a_layout():
    base, _, pins = read(LLAMA8B, ["parallel.tp=4", "train.recompute=full", "optim.lr=1e-4"])
    plans = search(base, make_cluster("h100", 16), pins).plans
    assert pins == {"tp": 4, "recompute": "full"} and base.optim.lr == 1e-4
    assert plans and {(plan.run.parallel.tp, plan.run.train.recompute) for plan in plans} == {(4, "full")}


def test_refusals_are_in_the_words_of_the_checks():
    base, _, pins = read(LLAMA8B, ["model.num_query_groups=2"])
    answer = search(base, make_cluster("h100", 8), pins)
    group = answer.refused["model.num_query_groups is not divisible by parallel.tp"]
    assert group.count > 1 and group.example == "model.num_query_groups(2) is not divisible by parallel.tp(4); legal tp: 1, 2"
    assert all(plan.run.parallel.tp <= 2 for plan in answer.plans)


def test_documents_under_transformer_engine_are_known():
    """A rule that the engine keeps beside its checks, for it holds only where those layers run."""
    base, _, pins = read(LLAMA8B, ["data.reset_at_eod=true"])
    plans = search(base, make_cluster("h100", 8), pins).plans
    assert plans and all(plan.run.parallel.cp == 1 and plan.run.train.micro_batch == 1 for plan in plans)


def test_what_surely_fits_and_what_surely_does_not():
    def judged(overrides, gpus, gpu="h100", **more):
        file = {**read(LLAMA8B, overrides)[1]}
        return own_layout(file, make_cluster(gpu, gpus, **more))[0]

    assert judged(["parallel.pp=2", "parallel.vpp=4"], 8).fits and judged([], 64).fits
    assert not judged(["parallel.cp=1"], 1).fits      # 18 bytes * 8e9 on one GPU
    assert not judged(["model.size=llama3_70b"], 8).fits
    assert not judged([], 8, "rtx-4090").fits


@pytest.fixture(scope="module")
def published():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import _planner_published

    return _planner_published


def test_what_a_gpu_is_compared_with_fits_one_of_80_gb(published):
    import planner

    for name, (model, train) in planner.SEVERAL.items():
        plan, problems = own_layout(raw(model, {}, {"precision": "bf16", **train}, run={"dir": "unused", "device": "cuda"}), make_cluster("h100", 1))
        assert not problems and plan.fits, name
    assert [kind_of(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200")] == ["h100", "h100-pcie", "h200"]
    full = ("NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA B300 SXM6 AC", "NVIDIA GB200")
    assert [kind_of(name) for name in full] == ["h100-nvl", "gh200", "b300", "gb200"]
    for name in ("Tesla T4", "NVIDIA GB300"):      # which is no B300
        with pytest.raises(ConfigError, match=f"{name} is no GPU known here"):
            kind_of(name)


def test_every_gpu_of_the_list_can_be_planned_for():
    told = re.sub(r"\s+", "", command("--help").stdout)      # a line may break at a hyphen
    for name, gpu in GPUS.items():
        assert gpu.tflops > 100 and gpu.memory_gbs > 500 and name in told
        assert make_cluster(name, 2 * gpu.per_node).num_nodes == 2
    assert make_cluster("gb200", 128, 2).nodes == "2 nodes of 64" and make_cluster("gh200", 4).num_nodes == 4


@pytest.fixture
def beside(published):
    import planner

    return planner


def test_an_unknown_gpu_is_told_before_anything_runs(beside, monkeypatch):
    done = subprocess.run([sys.executable, "benchmarks/planner.py", "several", "--gpu", "abacus"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --gpu abacus is no GPU known here; there are h100, h100-pcie, ") and done.stderr.count("\n") == 1
    monkeypatch.setattr(beside.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "Tesla T4\n"))
    with pytest.raises(ConfigError, match="Tesla T4 is no GPU known here; --gpu names one that is like it: h100, h100-pcie, "):
        beside.kind_of_gpu("")
    assert beside.kind_of_gpu("h200") == "h200"
    monkeypatch.setattr(beside, "several", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["planner.py", "several"])
    assert beside.main() == 2


def test_what_was_measured_is_judged_by_the_goals(beside):
    def good(*row, is_cpu=False):
        (line, is_within), = beside.judged([row], is_cpu)
        assert ("outside" in line or "not equal" in line) != is_within
        return is_within

    used, saved = "in use on the device", "activations of a micro-batch"
    assert good(used, 60, 64, "GiB") and good(used, 70, 64, "GiB") and not good(used, 71, 64, "GiB")
    assert good("step", 0.81, 1, "s") and not good("step", 0.79, 1, "s") and not good("step", 1.21, 1, "s")
    assert good("gradients", 1.0, 1.0, "GiB", is_cpu=True) and not good("gradients", 1 + 2**-30, 1.0, "GiB", is_cpu=True)
    assert good(saved, 1.0019, 1.0, "GiB", is_cpu=True) and not good(saved, 1.0021, 1.0, "GiB", is_cpu=True)
    assert beside.verdict(True, True, True)[1:] == beside.verdict(True, False, False)[1:] == (True, 0) and beside.verdict(False, True, True)[1:] == (False, 0)
    assert beside.verdict(True, True, False)[1:] == beside.verdict(True, False, True)[1:] == (False, 1)


def test_several_counts_what_is_within_and_fails_where_one_does(beside, monkeypatch, capfd):
    monkeypatch.setattr(beside, "SEVERAL", {"good": beside.SEVERAL["mixture of 8 experts"], "broken": (dict(family="abacus"), {})})
    assert beside.several("", 1, True) == 1
    said = capfd.readouterr()
    assert said.out.splitlines()[-1] == "1 of 2 within" and "  fits, as planned: within" in said.out
    assert said.out.count("  equal") == 3 and "within 0.2%" in said.out
    assert said.err.splitlines()[-1] == "failed, or wrong about whether it fits: broken"


def test_a_run_out_of_memory_that_was_planned_to_fit_counts_as_wrong(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(raw(GQA, {}, {})))
    code = "import sys; sys.path.insert(0, 'benchmarks'); import planner, torch, engine.mcore.run as run\n" \
           "def full(*_): raise torch.cuda.OutOfMemoryError('CUDA out of memory.')\n" \
           "run.ParallelModel = full; sys.argv = ['planner.py', 'run', sys.argv[1], '--found', sys.argv[2]]; sys.exit(planner.main())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml"), str(tmp_path / "found")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "planned: fits; the truth: does not fit" in done.stdout, done.stderr
    assert json.loads((tmp_path / "found").read_text()) == {"is_within": False}


def test_published_runs_fit(published):
    """Megatron-LM's table as it stands; the dense FP8 runs of NVIDIA with the bf16 gradients and moments and the FP8 parameters of its recipes."""
    for row in published.ROWS:
        if row.source == published.MEGATRON:
            assert published.least_recomputation(row) == "none", row.name
        elif row.source in (published.BRIDGE, published.NEMO) and row.model["family"] in ("gpt2", "llama"):
            assert published.least_recomputation(row, is_lean=True) == "none", row.name


def rate_of(published, row) -> float:
    plan = published.planned(row)
    return plan.tflops if row.unit == "TFLOP/s" else plan.tokens_per_gpu


def test_published_rates_of_dense_models_are_near(published):
    """docs/planner.md tells each; here, that no change to a formula goes unnoticed. At 128K the source does not say how it counts FLOPs."""
    for row in published.ROWS:
        if not row.model.get("family") in ("gpt2", "llama") or "128K" in row.name:
            continue
        assert rate_of(published, row) == pytest.approx(row.rate, rel=0.2 if row.source == published.NEMO else 0.11), row.name


def test_published_rates_of_mixtures_are_near(published):
    """Each with the dispatch that its source tells."""
    ratios = {(row.name, row.gpus): rate_of(published, row) / row.rate for row in published.ROWS if row.model["family"] not in ("gpt2", "llama")}
    assert len(ratios) == 6 and all(0.75 < ratio < 1.15 for ratio in ratios.values()), ratios


def test_traffic_of_experts_answers_to_how_tokens_are_sent(published):
    """64 ranks on 8 nodes; 8 experts of a token on 4 of them at most."""
    row = published.ROWS[-1]
    run, cluster = published.run_of(row, 1, 1, "none"), make_cluster("h100", 2048)
    ours, node, fp8, hidden, dual = (step_time(run, cluster, "te", Dispatch(*ways)) for ways in (
        (), (True,), (True, True), (True, True, True), (True, True, True, True)))
    assert node.ep / ours.ep == pytest.approx(4 * (1 - 0.75**8) / 8, rel=0.02) and fp8.ep / node.ep == pytest.approx(0.75, rel=0.02)
    assert hidden.ep == pytest.approx(0.1 * fp8.ep) and fp8.gemm < hidden.gemm < fp8.gemm * 132 / 112 and hidden.total < fp8.total
    assert dual.bubble / hidden.bubble == pytest.approx(7 * 2 / 3 / 15)      # (pp / 2 - 1) two thirds beside (pp - 1)
    assert ours == step_time(run, cluster, "te")


def test_experts_in_bf16_keep_the_host_less_busy(published):
    gpt_oss = next(row for row in published.ROWS if row.model["family"] == "gpt_oss")
    run = published.run_of(gpt_oss, 1, 1, "none")
    fp8 = run.model_copy(update={"train": run.train.model_copy(update={"fp8": run.train.fp8.model_copy(update={"recipe": "tensorwise"})})})
    assert step_time(run, make_cluster("h100", 64), "te").overhead < 0.5 * step_time(fp8, make_cluster("h100", 64), "te").overhead


def test_more_of_anything_needs_no_less():
    base, _, _ = read(LLAMA8B, [])
    run = own_layout(read(LLAMA8B, [])[1], make_cluster("h100", 8))[0].run

    def need(**train):
        return fullest(memory_of(run.model_copy(update={"train": run.train.model_copy(update=train)}), 8, "te"))[1]

    assert need(micro_batch=2).activations == pytest.approx(2 * need().activations, rel=0.01)
    assert need(recompute="full").total < need(recompute="selective").total <= need().total
    assert need(precision="fp32").total > need().total


def test_time_answers_to_the_hardware():
    run = own_layout(read(LLAMA8B, [])[1], make_cluster("h100", 64))[0].run
    slow, fast = (step_time(run, make_cluster("h100", 64, network=network), "te").total for network in ("10g", "ndr"))
    assert slow > 1.5 * fast
    assert step_time(run, make_cluster("a100", 64), "te").gemm > 2.5 * step_time(run, make_cluster("h100", 64), "te").gemm


def test_stages_of_several_networks_are_refused():
    with pytest.raises(ConfigError, match="stage=dpo trains beside other networks"):
        read(LLAMA8B, ["stage=dpo"])


def test_budget():
    run = load_config(LLAMA8B)
    assert budget.tokens_of(run) == 24000 * 512 * 8192
    cost = budget.of_run(run, tokens_per_second=1e6, num_gpus=100, tokens=1e12, price=2)
    assert cost.days == pytest.approx(1e12 / 1e6 / 86400) and cost.gpu_hours == pytest.approx(cost.days * 2400) and cost.price == 2 * cost.gpu_hours
    sizes = budget.chinchilla(run, 20 * 8030261248)      # 20 tokens for each parameter: it is its own best size
    assert sizes.best_tokens == pytest.approx(20 * sizes.parameters)
    assert sizes.best_parameters == pytest.approx(sizes.parameters, rel=1e-6)


def test_a_law_of_ones_own_shares_compute():
    from engine.recipe.scaling import Law

    law = Law("surface", {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28})      # Hoffmann et al., approach 3
    sizes = budget.chinchilla(load_config(LLAMA8B), 1e11, law)
    n, d = sizes.best_parameters, sizes.tokens_of_best
    assert 6 * n * d == pytest.approx(6 * sizes.parameters * 1e11) and d == pytest.approx(law.best_tokens(n), rel=1e-6)
    assert law.loss(n, d) < min(law.loss(n * 1.3, d / 1.3), law.loss(n / 1.3, d * 1.3))


def test_bad_clusters_are_told_at_once():
    with pytest.raises(ConfigError, match="--gpu h10O is no GPU known here; known: h100, .*, rtx-4090; name one .* --gpu-memory"):
        make_cluster("h10O", 8)
    with pytest.raises(ConfigError, match="nodes of 72; take 72 or 144, or say in --nodes how many"):
        make_cluster("gb200", 128)
    with pytest.raises(ConfigError) as caught:
        make_cluster("h100", 12, network="fast", memory_gib=-1)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="--gpu-memory nan"):
        make_cluster("h100", 8, memory_gib=float("nan"))


# --- the command ------------------------------------------------------------------------------------------------------------


def command(*args, code: int = 0):
    done = subprocess.run([sys.executable, "launch/plan.py", *args], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == code, done.stderr
    return done


def test_the_table_fits_a_terminal_and_needs_no_torch(tmp_path):
    code = "import runpy, sys; sys.argv = ['plan.py', sys.argv[1], '--gpus', '64']\ntry: runpy.run_path('launch/plan.py', run_name='__main__')\n" \
           "except SystemExit as end: assert end.code == 0\nassert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, LLAMA8B], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = lines.index(next(line for line in lines if line.lstrip().startswith("#")))
    assert max(map(len, lines[table:table + 11])) <= 100 and lines[table + 10].split()[0] == "10"
    assert "tokens/s/GPU" in lines[table] and "matrix products" in done.stdout and "Compute-optimal" in done.stdout


def test_json_and_write_agree(tmp_path):
    done = command(LLAMA8B, "--gpus", "8", "--json", "--top", "2", "--tokens", "1e12", "--price", "2", "--write", str(tmp_path / "new.yaml"), "--choose", "2")
    said = json.loads(done.stdout)
    plan = said["plans"][1]
    assert len(said["plans"]) == 2 and plan["tokens"] == 1e12 and plan["price"] == pytest.approx(2 * plan["gpu_hours"])
    assert load_config(tmp_path / "new.yaml", world_size=8).parallel.model_dump() == plan["parallel"]
    assert sum(value for name, value in plan["memory_bytes"].items() if name != "total") == plan["memory_bytes"]["total"]


def test_tokens_may_have_a_suffix():
    for text in ("1.5T", "1500b", "1.5e12", "1500000M", "1500000000k"):
        assert "\n1.5T tokens: " in command(LLAMA8B, "--tokens", text).stdout
    for text in ("1X", "T", "many", ""):
        assert f"--tokens: {text!r} is no number of tokens; say 15e12 or 15T" in command(LLAMA8B, "--tokens", text, code=2).stderr
    assert "--tokens -1e+12 must be 0 or more" in command(LLAMA8B, "--tokens=-1T", code=2).stderr


def test_a_chosen_row_is_told_in_full_and_written(tmp_path):
    told = command(LLAMA8B, "--gpus", "8", "--top", "3", "--choose", "2").stdout.splitlines()
    row = told[next(i for i, line in enumerate(told) if line.lstrip().startswith("#")) + 2].split()
    whole = next(i for i, line in enumerate(told) if line.startswith(("Best: ", "Row ")))
    assert told[whole].startswith(f"Row 2: tp {row[1]}, cp {row[2]}, pp 2, vpp {row[4]}, ")
    assert float(told[whole + 1].split()[5]) == pytest.approx(float(row[8]), abs=0.05)
    assert json.loads(command(LLAMA8B, "--gpus", "8", "--choose", "2", "--json").stdout)["chosen"] == 2
    done = command(LLAMA8B, "--gpus", "8", "--top", "3", "--choose", "4", "--write", str(tmp_path / "out.yaml"), code=2)
    assert "--choose 4 is no row of the list, which has 3; choose 1 to 3, or list more with --top 4\n" in done.stderr and not list(tmp_path.iterdir())


def test_how_flops_are_counted_is_said():
    counted = " FLOPs are those of Megatron's formula, attention counted in full"
    ladder = str(ROOT / "examples/long_context_128k/ladder.yaml")
    told = command(ladder, "--gpus", "64", "--top", "1").stdout
    assert re.search(re.escape(counted) + r";\n   with the half that the causal mask leaves, row 1 has (39|40)\d TFLOP/s, MFU (39|40)%\n", told)
    plan = json.loads(command(ladder, "--gpus", "64", "--top", "1", "--json").stdout)["plans"][0]
    shares = plan["causal_mfu"] / plan["mfu"], plan["causal_tflops_per_gpu"] / plan["tflops_per_gpu"]
    assert shares == pytest.approx((0.59, 0.59), abs=0.01)
    assert counted + "\n\n" in command(LLAMA8B, "--gpus", "8", "train.seq_len=2048").stdout      # 3% less


def test_fp8_is_tried_where_it_is_asked_for_and_can_be_had(tmp_path):
    done = command(LLAMA8B, "--gpus", "8", "--fp8", "--json", "--top", "400", "--write", str(tmp_path / "fp8.yaml"))
    assert {plan["fp8"] for plan in json.loads(done.stdout)["plans"]} == {"none", "tensorwise"}
    assert load_config(tmp_path / "fp8.yaml", world_size=8).train.fp8.recipe == "tensorwise"      # the fastest
    assert "A100 has no FP8" in command(LLAMA8B, "--fp8", "--gpu", "a100", code=2).stderr
    assert "train.backend=torch" in command(LLAMA8B, "--fp8", "train.backend=torch", code=2).stderr


def test_a_reader_that_has_enough_ends_it_without_a_word(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end) as out:
        done = subprocess.run([sys.executable, "launch/plan.py", LLAMA8B, "--gpus", "8", "--write", str(tmp_path / "out.yaml")], cwd=ROOT, stdout=out,
                              stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGPIPE and done.stderr == f"wrote layout 1 into {tmp_path}/out.yaml\n"


def test_nothing_fits_and_what_would_help():
    done = command(LLAMA8B, "--gpus", "8", "model.size=llama3_70b", "--gpu", "a100", code=1)
    assert "Nearest miss" in done.stdout and "  - 32 GPUs (4 nodes of 8): " in done.stdout and "No layout fits" in done.stdout


def test_what_hardly_misses_is_told_with_more_decimals():
    assert [gib(int(need * GIB), 79.1) for need in (79.2, 79.14, 79.1003, 79.1)] == ["79.2", "79.14", "79.1003", "79.1"]
    asked = (LLAMA8B, "--gpus", "1", "model.num_layers=4", "--gpu-memory")
    need = json.loads(command(*asked, "20", "--json", code=1).stdout)["do_not_fit"]["least_bytes"] / GIB
    room = round(need - 0.0005, 3)
    told = command(*asked, f"{room}", code=1).stdout
    assert f"  1: {gib(need * GIB, room)} GiB needed, of {room:g}, " in told
    assert f"micro-batch 1, recompute full needs {gib(need * GIB, room)} GiB, 0.00" in told


def test_help_where_no_layout_is_legal():
    done = command(LLAMA8B, "--gpus", "6", code=1)
    assert "No layout is legal on 6 GPUs." in done.stdout and "  - 8 GPUs (one node): " in done.stdout
    assert "  - train.global_batch=510, a multiple of 6: tp 2, " in done.stdout
    command(LLAMA8B, "--gpus", "8"), command(LLAMA8B, "--gpus", "6", "train.global_batch=510")      # what it says is so
    assert "(64 times as many were tried)" in command(LLAMA8B, "--gpus", "7", "parallel.tp=7", code=1).stdout


def test_help_keeps_nodes_of_the_given_size():
    assert "  - 32 GPUs (32 nodes of 1): " in command(LLAMA8B, "--gpus", "1", "--nodes", "1", "model.size=llama3_70b", code=1).stdout


def test_larger_clusters_are_whole_nodes():
    def tried(*asked):
        return [(more.num_gpus, more.per_node) for more in larger(make_cluster(*asked), 4)]

    assert tried("h100", 3) == [(4, 8), (8, 8)] and tried("h100", 7) == [(8, 8), (16, 8)]
    assert tried("h100", 24) == [(32, 8), (48, 8), (64, 8), (96, 8)]
    assert tried("h100", 12, 2) == [(16, 4), (18, 6), (24, 6), (32, 4), (48, 6)]


def test_a_users_mistakes_are_told_without_a_traceback():
    assert "train.sequence_length is no key" in command(LLAMA8B, "train.sequence_length=1", code=2).stderr
    assert "is no GPU known here" in command(LLAMA8B, "--gpu", "abacus", code=2).stderr
    assert "parallel.tp='two': input should be a valid integer" in command(LLAMA8B, "parallel.tp=two", code=2).stderr.lower()
    assert "train.micro_batch='many'" in command(LLAMA8B, "train.micro_batch=many", code=2).stderr
    assert "parallel.tpp is no key" in command(LLAMA8B, "parallel.tpp=2", code=2).stderr
    assert "tp(1) * pp(16) * cp(1) = 16 does not divide the world size 8" in command(LLAMA8B, "parallel.pp=16", code=1).stdout
    assert "--choose 9999 is no row of the list, which has 10; choose 1 to 10\n" in command(LLAMA8B, "--choose", "9999", code=2).stderr

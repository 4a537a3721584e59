"""The configuration: every refusal with its numbers and its cure, several mistakes in one go, overrides, and the round trip.

Left out: that a legal configuration also trains; the trainer's tests run some.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import engine.checks
from engine.config import ConfigError, RunConfig, dump_config, load_config, validate

BASE = """
run: {dir: runs/test}
model: {family: llama, num_layers: 4, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 8, vocab_size: 1000}
train: {seq_len: 64, global_batch: 16, steps: 100}
data: {train: [corpus]}
"""
MOE = ["model.moe.num_experts=8"]
GROUPS = [*MOE, "model.moe.num_groups=4", "model.moe.group_top_k=2"]


@pytest.fixture
def load(tmp_path):
    """load(overrides, world_size, text) -> RunConfig of BASE or another text."""
    def load(overrides=(), world_size=None, text=BASE):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, list(overrides), world_size)
    return load


@pytest.fixture
def problems(load):
    """problems(...) -> the sentences that load(...) is refused with."""
    def problems(*args, **kwargs) -> list[str]:
        with pytest.raises(ConfigError) as refusal:
            load(*args, **kwargs)
        assert all(problem in str(refusal.value) for problem in refusal.value.problems)
        return refusal.value.problems
    return problems


# One row per refusal of engine/checks.py: overrides, the world size if it matters, and the sentence it must give (alone).
VALID = ["data.valid.held_out=[there]", "train.eval_samples=8", "train.eval_every=5", "train.stop_when.metric=valid_loss"]
UB = ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true"]
NO_UB = [
    (["model.mtp={num_layers: 1}"], "has no buffer for the projection of model.mtp.num_layers(1)"),
    (["stage=sft", "data.train=[a.jsonl]"], "has buffers for batches of one shape, which those of stage=sft are not: it works with pretrain, continued, anneal"),
    (["train.precision=fp32"], "adds what it receives as bf16, but train.precision=fp32"),
    (["parallel.tp=3", "model.num_attention_heads=12", "model.num_query_groups=3", "model.hidden_size=192", "model.ffn_hidden_size=384", "train.seq_len=96",
      "model.vocab_size=384"], "has kernels for parallel.tp of 2, 4, 8 ..., not 3"),
]
GRAPHS = [
    (["model.num_query_groups=0", "model.mla.kv_lora_rank=8"], "model.mla.kv_lora_rank(8): recording latent attention is not offered"),
    (["parallel.pp=2"], "parallel.pp(2): recording through a pipeline is not offered"),
    (["parallel.cp=2"], "parallel.cp(2): its attention runs on several streams"),
    (["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true"], "parallel.tp_comm_overlap, which runs on streams of its own"),
    (["data.reset_at_eod=true", "data.eod_id=3"], "data.reset_at_eod: every batch has other documents"),
    (["train.recompute=selective"], "train.recompute=selective"),
    (["train.compile=true"], "train.compile"),
    (["train.backend=torch"], "train.backend=torch; graphs are recorded of Transformer Engine's layers"),
    (["run.device=cpu"], "run.device=cpu"),
    (["model.hidden_dropout=0.1"], "model.hidden_dropout(0.1): validation would replay it"),
    (["model.attention_dropout=0.1"], "model.attention_dropout(0.1): validation would replay it"),
    (["lora.rank=8"], "lora.rank(8), whose layers are torch's"),
    (["model.sliding_window=8", "model.rope_local_theta=100"], "model.rope_local_theta(100): layers that turn by other angles are not recorded"),
    (["model.mtp={num_layers: 1}"], "model.mtp.loss_weight(0.3), whose layers run once more"),
    (MOE, "model.moe.num_experts(8): how many tokens an expert gets differs from step to step"),
    (["stage=long_context", "checkpoint.load=x", "data.valid.v=[x]", "train.eval_samples=4",
      "long_context.ladder=[{seq_len: 128, tokens: 9, global_batch: 2}]"],
     "stage=long_context has batches of several shapes, or several networks; it works with pretrain, continued, anneal"),
]
FIM = ["data.fim={rate: 0.5, prefix_id: 4, middle_id: 5, suffix_id: 6}"]
REFUSALS = [
    (VALID, None, "train.stop_when.metric=valid_loss has no limit; give at_most or at_least"),
    ([*VALID[:2], VALID[3], "train.stop_when.at_most=2"], None,
     "train.stop_when waits for validations, but train.eval_every is 0 and eval_samples 8; set both above 0"),
    ([*VALID, "train.stop_when.at_most=2", "train.stop_when.set=other"], None,
     "train.stop_when.set=other is no validation set; data.valid has held_out"),
    (["stage=pretran"], None, "stage=pretran is unknown; did you mean pretrain?"),
    (["model.hidden_size=68"], None, "model.hidden_size(68) is not divisible by num_attention_heads(8); set model.head_dim or change one of them"),
    (["model.num_query_groups=3"], None, "model.num_attention_heads(8) is not divisible by num_query_groups(3); legal num_query_groups: 1, 2, 4, 8"),
    (["parallel.tp=16"], None, "model.num_attention_heads(8) is not divisible by parallel.tp(16); legal tp: 1, 2, 4, 8"),
    (["parallel.tp=4", "model.num_query_groups=2"], None, "model.num_query_groups(2) is not divisible by parallel.tp(4); legal tp: 1, 2"),
    (["parallel.tp=4", "model.ffn_hidden_size=130"], None, "model.ffn_hidden_size(130) is not divisible by parallel.tp(4); legal tp: 1, 2, 5, 10, 13, 26"),
    (["model.head_dim=9"], None, "RoPE rotates pairs, but head_dim(9) * rope_percent(1.0) is odd; change model.head_dim"),
    (["model.position=none", "model.rope_scaling.kind=linear"], None,
     "model.rope_scaling.kind=linear stretches RoPE, but model.position=none; set kind=none"),
    (["model.head_dim=2", "model.rope_scaling.kind=ntk"], None,
     "model.rope_scaling.kind=ntk needs 4 rotated dims or more, but head_dim * rope_percent is 2; set kind=linear"),
    (["model.rope_scaling={kind: yarn, original_max_position: 1, factor: 64}"], None, "model.rope_scaling.original_max_position(1) has no "
     "logarithm to divide by in kind=yarn; set the length the model was first trained at"),
    (["model.rope_scaling.kind=yarn", "model.rope_theta=1"], None, "model.rope_scaling.kind=yarn needs model.rope_theta above 1, not 1"),
    (["model.rope_scaling={kind: yarn, original_max_position: 4}"], None,
     "model.rope_scaling.factor(8) * original_max_position(4) is shorter than train.seq_len(64); raise factor to 16"),
    (["model.rope_scaling={kind: yarn, beta_fast: 1, beta_slow: 2}"], None, "model.rope_scaling.beta_fast(1) is below beta_slow(2), but dims "
     "that turn more often are the ones to keep; swap them"),
    (["model.rope_scaling={kind: llama3, low_freq_factor: 4}"], None,
     "model.rope_scaling.high_freq_factor(4) must exceed low_freq_factor(4); raise it"),
    (["model.rope_scaling={kind: longrope, long_factor: [1, 2, 3, 4], short_factor: [1]}"], None, "model.rope_scaling.short_factor has 1 entries, "
     "but kind=longrope divides 4 pairs (head_dim(8) * rope_percent(1) / 2); give one each"),
    (["model.rope_scaling={kind: longrope, long_factor: [1, 2, 0, 4], short_factor: [1, 1, 1, 1]}"], None,
     "model.rope_scaling.long_factor holds 0, but frequencies are divided by it; give positive numbers"),
    (["parallel.vpp=2"], None, "parallel.vpp(2) needs a pipeline; set parallel.pp to 2 or more, or vpp to 1"),
    (["parallel.pp=2", "parallel.pp_layers=[1,1,2]"], None, "parallel.pp_layers has 3 numbers, but parallel.pp(2) * vpp(1) = 2 chunks; give one for each"),
    (["parallel.pp=2", "parallel.pp_layers=[1,2]"], None, "parallel.pp_layers sums to 3, but model.num_layers is 4; add or remove 1"),
    (["parallel.pp=3"], None, "model.num_layers(4) is not divisible by parallel.pp(3) * vpp(1) = 3; legal pp * vpp: 1, 2, 4; or say in parallel.pp_layers how many each chunk has"),
    (["parallel.tp=4", "model.vocab_pad_multiple=10", "model.vocab_size=1001"], None,
     "model.vocab_size(1001), padded to 1010, is not divisible by parallel.tp(4); set model.vocab_pad_multiple to a multiple of 4"),
    (["parallel.cp=3"], None, "train.seq_len(64) is not divisible by 2 * parallel.cp(3) = 6 (each rank holds two chunks); legal cp: 1, 2, 4, 8, 16, 32"),
    (["parallel.cp=2", "parallel.tp=4", "parallel.sequence_parallel=true", "train.seq_len=36"], None,
     "train.seq_len(36) / cp(2) is not divisible by tp(4), which sequence_parallel needs; legal tp: 1, 2, 3, 6, 9, 18"),
    (["model.position=learned", "model.max_position=32"], None, "train.seq_len(64) exceeds model.max_position(32) of the learned positions; raise it"),
    (["parallel.ep=2"], None, "parallel.ep(2) needs experts; set model.moe.num_experts, or ep to 1"),
    (["parallel.etp=2"], None, "parallel.etp(2) needs experts; set model.moe.num_experts, or etp to 0"),
    ([*MOE, "model.moe.top_k=9"], None, "model.moe.top_k(9) exceeds num_experts(8); lower top_k"),
    ([*MOE, "parallel.ep=3"], None, "model.moe.num_experts(8) is not divisible by parallel.ep(3); legal ep: 1, 2, 4, 8"),
    ([*MOE, "parallel.etp=4", "model.moe.ffn_hidden_size=6"], None, "expert width(6) is not divisible by parallel.etp(4); legal etp: 1, 2, 3, 6"),
    ([*MOE, "parallel.tp=2", "parallel.sequence_parallel=true", "model.moe.shared_expert_ffn_hidden_size=9"], None,
     "model.moe.shared_expert_ffn_hidden_size(9) is not divisible by parallel.tp(2); legal tp: 1, 3, 9"),
    ([*MOE, "parallel.tp=2"], None, "experts under parallel.tp(2) need parallel.sequence_parallel=true"),
    ([*MOE, "model.linear_bias=true", "model.moe.shared_expert_ffn_hidden_size=8"], None,
     "model.linear_bias=true, but shared experts have no biases; set linear_bias=false or shared_expert_ffn_hidden_size=0"),
    ([*MOE, "model.linear_bias=true", "parallel.etp=2"], None,
     "model.linear_bias=true: experts with biases cannot be split over parallel.etp(2); set etp=1"),
    ([*MOE, "model.moe.balance=aux_free"], None, "model.moe.balance=aux_free biases sigmoid scores, but model.moe.score=softmax; set score=sigmoid"),
    ([*MOE, "model.moe.balance=sinkhorn"], None, "model.moe.balance=sinkhorn routes each token to one expert, but top_k=2; set top_k=1"),
    ([*MOE, "model.moe.pad_to_capacity=true"], None, "model.moe.pad_to_capacity needs a capacity_factor; set model.moe.capacity_factor, 1.0 say"),
    ([*MOE, "model.moe.pad_to_capacity=true", "model.moe.capacity_factor=4.5"], None,
     "model.moe.capacity_factor(4.5) with pad_to_capacity makes room for more tokens than there are; it drops nothing from "
     "num_experts(8) / top_k(2) = 4 on, so lower it to that"),
    ([*MOE, "model.moe.balance=sinkhorn", "model.moe.top_k=1", "model.moe.capacity_factor=1.0"], None,
     "model.moe.capacity_factor(1.0) has no meaning for balance=sinkhorn, which fills experts evenly; set it to 0"),
    ([*GROUPS, "model.moe.num_groups=3"], None, "model.moe.num_experts(8) is not divisible by num_groups(3); legal num_groups: 1, 2, 4, 8"),
    ([*GROUPS, "model.moe.group_top_k=0"], None, "model.moe.group_top_k(0) must be 1 to num_groups(4)"),
    ([*GROUPS, "model.moe.top_k=5"], None,
     "model.moe.top_k(5) exceeds the 4 experts of group_top_k(2) groups of 2; raise group_top_k or lower top_k"),
    ([*GROUPS, "model.moe.group_score_top=3"], None, "model.moe.group_score_top(3) exceeds the 2 experts of a group; lower it"),
    ([*GROUPS, "model.moe.balance=sinkhorn", "model.moe.top_k=1"], None,
     "model.moe.num_groups limits a top-k choice, but balance=sinkhorn makes none; set num_groups=0"),
    (["model.mla.kv_lora_rank=8", "model.qk_norm=true"], None,
     "model.qk_norm has no place in latent attention (model.mla.kv_lora_rank=8), which has heads of its own; leave it out"),
    (["model.mla={kv_lora_rank: 8, qk_rope_head_dim: 3}"], None, "RoPE rotates pairs, but model.mla.qk_rope_head_dim(3) is odd; change it"),
    (["model.mtp.num_layers=1", "stage=reward"], None, "model.mtp.num_layers(1): stage=reward has one number per token and no further tokens; set it "
     "to 0, and a checkpoint's layers for them stay behind"),
    (["model.mtp.num_layers=1", "model.position=learned"], None, "model.mtp.num_layers(1): learned positions are not kept beside these layers; set "
     "model.position=rope, or num_layers=0"),
    (["model.mtp.num_layers=1", "stage=dpo"], None, "model.mtp.loss_weight(0.3) is that of a loss beside next tokens' (pretrain, continued, "
     "long_context, anneal, sft), but stage=dpo; set it to 0, which keeps these layers as they are"),
    (["model.mtp.num_layers=1", "lora.rank=4"], None, "model.mtp.loss_weight(0.3): with lora.rank(4) nothing but adapters learns, and these layers "
     "have none; set it to 0, which keeps them as they are"),
    (["faults.spike=rollback"], None, "faults.spike=rollback goes back to a checkpoint, but checkpoint.save_every is 0; set it, or faults.spike=skip"),
    (["profile.first_step=101"], None, "profile.first_step(101) is after the last step of this run(100; steps before a resume count too), so nothing "
     "would be profiled; set it to 100 or less, or to 0"),
    (["profile.first_step=3", "profile.ranks=[2]"], 2, "profile.ranks names rank 2, but the 2 ranks of this run are numbered from 0 to 1"),
    (["model.mtp.num_layers=64"], None, "model.mtp.num_layers(64) leaves no token of train.seq_len(64) to predict; lower it"),
    (["model.rope_local_theta=100"], None, "model.rope_local_theta(100) is the base period of layers with a sliding window, but sliding_window is 0 "
     "and position=rope; set it to 0"),
    (["model.rope_local_theta=100", "model.sliding_window=8", "model.rope_scaling={kind: yarn, original_max_position: 64}"], None,
     "model.rope_local_theta with rope_scaling.kind=yarn: its factor of cos and sin would reach all layers; set rope_local_theta=0, or another kind"),
    (["model.attention_softcap=50", "train.backend=te"], None, "model.attention_softcap=50 exists for the torch layers alone; set train.backend=torch"),
    (["model.attention_softcap=50", "train.fp8.recipe=delayed"], None,
     "train.fp8.recipe=delayed needs Transformer Engine, which has no model.attention_softcap=50 here; set it to none"),
    (["model.attention_softcap=50", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true"], None,
     "parallel.tp_comm_overlap needs Transformer Engine, which has no model.attention_softcap=50 here; set it to false"),
    (["model.norm_zero_centered=true", "model.norm=layernorm"], None, "model.norm_zero_centered=true is for rmsnorm, but model.norm=layernorm; set it to false"),
    (["model.norm_zero_centered=true", "model.qk_norm=true", "model.qk_norm_width=all"], None,
     "model.norm_zero_centered=true: a norm over all heads (model.qk_norm_width=all) is not centred so; set qk_norm_width=head"),
    ([*MOE, "model.moe.first_dense_layers=4"], None,
     "model.moe.num_experts(8) but no layer is MoE: layer_freq(1), first_dense_layers(4), dense_layers([]), num_layers(4)"),
    ([*MOE, "model.moe.dense_layers=[1,4]"], None, "model.moe.dense_layers names [4], but the last of num_layers(4) is 3; leave them out"),
    (["model.sliding_window=8", "model.full_attention_layers=4"], None,
     "model.sliding_window(8) but no layer has it: full_attention_layers(4), sliding_window_freq(1), num_layers(4)"),
    (["model.norm=layernorm", "model.qk_norm=true", "model.qk_norm_width=all"], None,
     "model.qk_norm_width=all normalises over tp ranks with rmsnorm alone, but model.norm=layernorm; set qk_norm_width=head"),
    (["parallel.sequence_parallel=true"], None,
     "parallel.sequence_parallel splits over tp ranks, but parallel.tp is 1; set tp >= 2 or sequence_parallel=false"),
    (["model.num_query_groups=0", "model.mla.kv_lora_rank=8", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true"], None,
     "parallel.tp_comm_overlap has no buffers for the projections of latent attention (model.mla.kv_lora_rank=8), which are not as wide as "
     "hidden_size; set it to false"),
    (["model.num_query_groups=0", "train.fp8.recipe=blockwise",
      "model.mla={q_lora_rank: 24, kv_lora_rank: 16, qk_nope_head_dim: 5, qk_rope_head_dim: 8, v_head_dim: 5}"], None,
     "train.fp8.recipe=blockwise multiplies matrices whose dims are multiples of 16, which model.mla.q_lora_rank(24), "
     "mla.kv_lora_rank + qk_rope_head_dim(24), num_attention_heads / tp * (mla.qk_nope_head_dim + qk_rope_head_dim)(104), "
     "num_attention_heads / tp * mla.v_head_dim(40) is not"),
    (["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"], None,
     "parallel.overlap_param_gather gathers what zero1 has split; set parallel.zero1=true"),
    (["parallel.overlap_param_gather=true", "parallel.zero1=true"], None, "parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true"),
    (["run.device=cpu", "train.backend=te"], None, "train.backend=te needs a GPU, but run.device=cpu; set train.backend=torch"),
    (["parallel.tp_comm_overlap=true", "train.backend=torch"], None, "parallel.tp_comm_overlap needs Transformer Engine, but train.backend=torch"),
    (["parallel.tp_comm_overlap=true"], None,
     "parallel.tp_comm_overlap overlaps the communication of sequence parallel; set parallel.sequence_parallel=true"),
    *(([*UB, *overrides], None, f"parallel.tp_comm_overlap {reason}; set it to false") for overrides, reason in NO_UB),
    *((["train.cuda_graphs=true", *overrides], None, f"train.cuda_graphs does not go with {reason}; change that, or set train.cuda_graphs=false")
      for overrides, reason in GRAPHS),
    (["train.cuda_graphs=true", "model.attention_softcap=50"], None,
     "train.cuda_graphs needs Transformer Engine, which has no model.attention_softcap=50 here; set it to false"),
    (["train.fp8.params=true", "train.fp8.recipe=delayed", "parallel.zero1=true", "faults.replica_check_every=5"], None,
     "faults.replica_check_every(5) compares weights bit for bit, which train.fp8.params=true keeps in another form; set it to 0, or params=false"),
    (["train.fp8.params=true"], None, "train.fp8.params keeps parameters in FP8, but train.fp8.recipe is none; choose a recipe"),
    (["train.fp8.recipe=delayed", "train.backend=torch"], None,
     "train.fp8.recipe=delayed needs Transformer Engine, but train.backend=torch; set train.backend=te"),
    (["train.fp8.recipe=mxfp8", "train.precision=fp32"], None, "train.fp8.recipe=mxfp8 works beside bf16, but train.precision=fp32; set it to bf16"),
    (["train.fp8.recipe=tensorwise", "train.fp8.params=true"], None,
     "train.fp8.params keeps master weights in the optimizer of parallel.zero1; set zero1=true"),
    (["train.fp8.recipe=mxfp8", "train.fp8.params=true", "parallel.zero1=true"], None,
     "train.fp8.params=true, but parameters of train.fp8.recipe=mxfp8 cannot share the buffer that is gathered; set params=false"),
    (["train.fp8.recipe=mxfp8", "model.ffn_hidden_size=80", "train.seq_len=48"], None,
     "train.fp8.recipe=mxfp8 multiplies matrices whose dims are multiples of 32, which model.ffn_hidden_size / tp(80), "
     "tokens of a micro-batch per rank(48) is not"),
    (["optim.precision_aware=true"], None, "optim.precision_aware needs parallel.zero1=true"),
    (["optim.precision_aware=true", "parallel.zero1=true", "train.precision=fp16"], None,
     "optim.precision_aware keeps gradients and moments in bf16, but train.precision=fp16; set it to bf16"),
    (["train.rampup={start: 32, samples: 9}"], None, "train.rampup.start(32) exceeds train.global_batch(16)"),
    (["train.rampup={start: 4, increment: 5, samples: 9}"], None, "train.rampup: global_batch(16) - start(4) is not a multiple of increment(5)"),
    (["train.rampup={start: 4, increment: 4}"], None, "train.rampup.samples is 0; set the samples over which the batch grows"),
    (["schedule.warmup_steps=100"], None, "schedule.warmup_steps(100) leaves no step of the 100 to decay; lower it"),
    (["schedule.kind=inverse_sqrt"], None, "schedule.kind=inverse_sqrt scales with warmup_steps, which is 0; set it to 1 or more"),
    (["schedule.init_lr=1", "schedule.warmup_steps=3"], None,
     "schedule.init_lr(1.0) exceeds optim.lr(0.0003), so the warm-up would fall; lower init_lr"),
    (["schedule.min_lr=0.1"], None, "schedule.min_lr(0.1) exceeds optim.lr(0.0003); lower it"),
    (["schedule.kind=wsd"], None, "schedule.kind=wsd needs schedule.wsd_decay_steps, the length of the final decay"),
    (["schedule.kind=wsd", "schedule.wsd_decay_steps=99", "schedule.warmup_steps=2"], None,
     "schedule.wsd_decay_steps(99) + warmup_steps(2) exceed the 100 steps of the schedule"),
    (["data.train=[]"], None, "data.train is empty; name at least one corpus prefix (data_tools/preprocess.py writes them)"),
    (["data.split='9,1'", "data.valid.pile=[x]"], None,
     "data.split cuts the validation set out of data.train, but data.valid names one too; use one of them"),
    (["data.buffer=pinned", "run.device=cpu"], None,
     "data.buffer=pinned is memory that a GPU copies from, but run.device=cpu; set data.buffer=auto"),
    (["data.buffer=shared"], None, "data.buffer=shared passes batches from the rank that reads to the others, but data.read_on=every_rank; set "
     "data.read_on=first_rank"),
    (["stage=dpo", "data.read_on=first_rank"], None, "data.read_on=first_rank is for pretrain, continued, long_context, anneal, sft, reward, but "
     "stage=dpo looks at its data on every rank; set data.read_on=every_rank"),
    (["data.reset_at_eod=true"], None, "data.reset_at_eod and eod_mask_loss need the end-of-document token; set data.tokenizer or data.eod_id"),
    (["data.eod_id=1000"], None, "data.eod_id(1000) is beyond model.vocab_size(1000)"),
    (["train.eval_every=5"], None, "train.eval_every is set but train.eval_samples is 0; set how many samples a validation reads"),
    (["train.eval_samples=5"], None, "train.eval_samples(5) but there is no validation set; set data.valid or data.split"),
    (["tune.freeze=[head]"], None, "tune.freeze names head; known: embedding, output, norms, router, experts, layers, layers:N, layers:FIRST-LAST"),
    (["tune.freeze=[norms:3]"], None, "tune.freeze names norms:3; known: embedding, output, norms, router, experts, layers, layers:N, layers:FIRST-LAST"),
    (["tune.freeze=['layers:2-4']"], None,
     "tune.freeze names layers:2-4, but the model has layers 0 to 3; write layers:0-3 or layers:0"),
    (["tune.freeze=[embedding, layers, norms, output]"], None,
     "tune.freeze(embedding, layers, norms, output) leaves nothing that could learn; leave one of them out"),
    (["stage=sft", "data.phases=[{after_tokens: 5, train: [1, x]}]"], None,
     "data.phases changes the corpora of pretrain, continued, anneal, but stage=sft; remove it"),
    (["data.phases=[{after_tokens: 0, train: [1, x]}]"], None, "data.phases.0 replaces data.train before its first token; put its list into "
     "data.train, or give it after_tokens or ramp_tokens"),
    (["data.phases=[{after_tokens: 5, train: []}]"], None, "data.phases.0.train is empty; name at least one corpus prefix"),
    (["data.phases=[{after_tokens: 5, ramp_tokens: 9, train: [1, x]}, {after_tokens: 8, train: [1, x]}]"], None,
     "data.phases.1 begins after 8 tokens, while data.phases.0 changes until 14; list phases in order of time, or shorten the ramp"),
    (["data.phases=[{after_tokens: 5, train: [1, x]}, {after_tokens: 5, train: [1, x]}]"], None,
     "data.phases.1 begins after 5 tokens, like data.phases.0; remove one of them"),
    (["stage=sft", "data.max_epochs={x: 2}"], None, "data.max_epochs limits the corpora of pretrain, continued, anneal, but stage=sft; remove it"),
    (["data.max_epochs={x: 2}", "data.one_epoch=true"], None,
     "data.one_epoch refuses to read a token twice and data.max_epochs says how often one may be read; use one of them"),
    (["stage=sft", "data.valid_by_source=true"], None,
     "data.valid_by_source tells the losses of corpora of text (pretrain, continued, long_context, anneal), but stage=sft; remove it"),
    ([*FIM, "stage=sft", "data.eod_id=3"], None, "data.fim changes text of pretrain, continued, long_context, anneal, but stage=sft; remove it"),
    (FIM, None, "data.fim changes documents one by one and needs the token that ends them; set data.tokenizer or data.eod_id"),
    ([*FIM, "data.eod_id=3", "data.fim.suffix_id=-1"], None, "data.fim.prefix_id(4), middle_id(5) and suffix_id(-1) must be tokens of model.vocab_size(1000) "
     "that text does not use; set those of the tokenizer"),
    ([*FIM, "data.eod_id=6"], None, "data.fim.prefix_id(4), middle_id(5) and suffix_id(6) must differ from each other and from data.eod_id(6)"),
    (["data.replay=[1, x]"], None, "data.replay is read by stage continued, but stage=pretrain; put its corpora into data.train, or set stage=continued"),
    (["stage=continued", "data.replay=[1, x]", "data.replay_share=0"], None,
     "data.replay is given but data.replay_share is 0; set the share of samples to take from it, or remove data.replay"),
    (["stage=anneal", "schedule.warmup_steps=3"], None,
     "stage=anneal has no warm-up, but schedule.warmup_steps(3); set it to 0, or take stage=continued"),
    (["average.kind=ema", "average.every=60", "average.start=0.7"], None, "average.every(60) after average.start(0.7) of 100 steps takes no weights; "
     "lower one of them, or set average.kind=none"),
    (["average.kind=ema", "train.fp8={recipe: tensorwise, params: true}", "parallel.zero1=true"], None,
     "average.kind needs parameters in plain precision, but train.fp8.params=true; set one of them otherwise"),
    (["stage=long_context", "checkpoint.load=x", "data.valid.v=[x]", "train.eval_samples=4", "train.global_batch=2",
      "long_context.ladder=[{seq_len: 128, tokens: 9, global_batch: 3}]"], 2,
     "long_context.ladder.0: train.global_batch(3) is not divisible by micro_batch(1) * dp(2) = 2; legal global_batch: multiples of 2"),
    (["faults.spike=rollback"], None,
     "faults.spike=rollback goes back to a checkpoint, but checkpoint.save_every is 0; set it, or faults.spike=skip"),
    (["profile.first_step=2", "profile.ranks=[4]"], 2, "profile.ranks names rank 4, but the 2 ranks of this run are numbered from 0 to 1"),
    (["parallel.tp=4"], 2, "tp(4) * pp(1) * cp(1) = 4 does not divide the world size 2; start 4 ranks or a multiple (torchrun --nproc-per-node)"),
    (["parallel.pp=4"], 6, "tp(1) * pp(4) * cp(1) = 4 does not divide the world size 6; start a multiple of 4 ranks, "
                           "or choose a product among 1, 2, 3, 6"),
    ([*MOE, "parallel.ep=8"], 4, "etp(1) * ep(8) * pp(1) = 8 does not divide the world size 4; legal ep: 1, 2, 4"),
    (["train.global_batch=18"], 4, "train.global_batch(18) is not divisible by micro_batch(1) * dp(4) = 4; legal global_batch: multiples of 4"),
    (["parallel.pp=2", "parallel.vpp=2", "train.global_batch=3"], 2,
     "train.global_batch(3) makes 3 micro-batches, which the interleaved schedule needs divisible by parallel.pp(2); "
     "legal global_batch: multiples of 2"),
    (["train.rampup={start: 4, increment: 6, samples: 9}"], 4,
     "train.rampup.start(4) and increment(6) must be multiples of 4 (micro_batch * dp, times pp when interleaved)"),
]


@pytest.mark.parametrize("overrides, world_size, sentence", REFUSALS, ids=[sentence[:50] for *_, sentence in REFUSALS])
def test_refusal(problems, overrides, world_size, sentence):
    assert problems(overrides, world_size) == [sentence]


def test_no_refusal_is_without_a_row(load):
    source = Path(engine.checks.__file__).read_text()
    yields = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Yield)}
    reached = set()

    def trace(frame, event, arg):
        if frame.f_code.co_filename == engine.checks.__file__:
            reached.add(frame.f_lineno)
            return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for overrides, world_size, _ in REFUSALS:
            with pytest.raises(ConfigError):
                load(overrides, world_size)
    finally:
        sys.settrace(before)
    assert len(yields) > 40 and yields - reached == set()


LEGAL = [
    ([], None), ([], 1), ([], 16), (["parallel.tp=2", "parallel.pp=2", "parallel.vpp=2", "parallel.cp=2"], 16),
    (["parallel.tp=8", "parallel.sequence_parallel=true"], 8), ([*MOE, "parallel.ep=4"], 8), ([*MOE, "parallel.ep=8", "parallel.pp=2"], 16),
    ([*MOE, "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.etp=1", "parallel.ep=4"], 4),
    (["model.hidden_size=68", "model.head_dim=16"], None), (["schedule.kind=constant", "schedule.warmup_steps=100"], None),
    (["schedule.kind=wsd", "schedule.wsd_decay_steps=98", "schedule.warmup_steps=2"], None), (["schedule.init_lr=1"], None),
    (["train.rampup={start: 4, increment: 4, samples: 100}"], 4), (["data.split='9,1,0'", "train.eval_samples=8"], None),
    (["data.reset_at_eod=true", "data.eod_id=999"], None), (["data.read_on=first_rank", "data.buffer=shared", "data.prefetch=true"], None), (["train.fp8.recipe=delayed", "train.fp8.params=true", "parallel.zero1=true"], None),
    (["model.position=learned", "model.max_position=64"], None), (["model.position=none", "model.head_dim=9"], None),
    (["model.mtp={num_layers: 1, loss_weight: 0}", "stage=dpo"], None), (["model.mtp={num_layers: 1, loss_weight: 0}", "lora.rank=4"], None),
]


@pytest.mark.parametrize("overrides, world_size", LEGAL)
def test_legal_neighbours_of_the_refusals(load, overrides, world_size):
    assert isinstance(load(overrides, world_size), RunConfig)


def test_several_mistakes_are_told_at_once(problems):
    found = problems(["train.lr=1", "parallel.pp=3", "schedule.min_lr=1", "optim.beta1=1.5", "train.global_batch=18"], world_size=5)
    assert found == [
        "train.lr is no key of this configuration; did you mean optim.lr?",
        "optim.beta1=1.5: input should be less than 1",
        "model.num_layers(4) is not divisible by parallel.pp(3) * vpp(1) = 3; legal pp * vpp: 1, 2, 4; or say in parallel.pp_layers how many each chunk has",
        "schedule.min_lr(1.0) exceeds optim.lr(0.0003); lower it",
        "tp(1) * pp(3) * cp(1) = 3 does not divide the world size 5; start a multiple of 3 ranks, or choose a product among 1, 5",
    ]


@pytest.mark.parametrize("bad, told", [
    ("train.steps=ten", "train.steps='ten': input should be a valid integer, unable to parse string as an integer"),
    ("train.seq_len=1", "train.seq_len=1: input should be greater than or equal to 2"),
    ("model.vocab_size=null", "model.vocab_size=None: input should be a valid integer"),
    ("run.dir=null", "run.dir=None: input should be a valid string"),
    ("run=here", "run='here': input should be a mapping with the keys of Run"),
    ("train=long", "train='long': input should be a mapping with the keys of Train"),
    ("data=corpus", "data='corpus': input should be a mapping with the keys of Data"),
    ("data.valid.pile=x", "data.valid.pile='x': input should be a valid list"),
])
def test_a_refused_field_hides_no_other_mistake_and_brings_none(problems, bad, told):
    # With the bad field alone there is one sentence; with another mistake beside it, two.
    assert problems([bad]) == [told]
    assert problems([bad, "parallel.pp=3"]) == [
        told, "model.num_layers(4) is not divisible by parallel.pp(3) * vpp(1) = 3; legal pp * vpp: 1, 2, 4; or say in parallel.pp_layers how many each chunk has"]


def test_checks_that_need_a_refused_field_are_silent(problems):
    bad = "parallel.tp='two': input should be a valid integer, unable to parse string as an integer"
    assert problems(["parallel.tp=two", "parallel.sequence_parallel=true", *MOE], world_size=7) == [bad]
    assert problems(["data.train=3", "train.eval_samples=2", "data.valid=3"])[1:] == ["data.valid=3: input should be a valid dictionary"]


def test_a_refused_field_leaves_later_configurations_whole(load, problems):
    problems(["parallel=3", "model.rope_scaling=3", "optim.lr=fast"])
    run = load()
    assert run.parallel.tp == 1 and run.model.rope_scaling.factor == 8.0 and run.optim.lr == 3e-4


@pytest.mark.parametrize("key, hint", [
    ("parallel.ttp=1", "parallel.ttp is no key of this configuration; did you mean tp?"),
    ("modl.num_layers=3", "modl is no key of this configuration; did you mean model?"),
    ("model.num_expert=3", "model.num_expert is no key of this configuration"),
    ("train.lr=3", "train.lr is no key of this configuration; did you mean optim.lr?"),
    ("tp=3", "tp is no key of this configuration; did you mean parallel.tp?"),
    ("model.num_experts=3", "model.num_experts is no key of this configuration; did you mean model.moe.num_experts?"),
    ("model.moe.ffn=3", "model.moe.ffn is no key of this configuration"),
    ("run.qqqq=3", "run.qqqq is no key of this configuration; known: deterministic, device, dir, seed, timeout_minutes"),
])
def test_an_unknown_key_names_the_nearest(problems, key, hint):
    [problem] = problems([key])
    assert problem.startswith(hint)


def test_required_keys_are_named(problems):
    text = "model: {family: llama}\ntrain: {seq_len: 8}\ndata: {train: [x]}"
    assert problems(text=text) == [f"{key} is required" for key in (
        "run", "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads", "model.vocab_size",
        "train.global_batch", "train.steps")]


TRAIN = "run: {dir: x}\ntrain: {seq_len: 8, global_batch: 1, steps: 1}\ndata: {train: [x]}\n"


@pytest.mark.parametrize("model, told", [
    ("{family: lama, size: llama3_8b}", "model.family=lama is unknown; did you mean llama?"),
    ("{family: llama, size: llama3_9b}", "model.size=llama3_9b is no size of llama; did you mean llama3_8b?"),
    ("{size: llama3_8b}", "model.family is required"),
])
def test_a_preset_that_cannot_be_found_is_one_mistake(problems, model, told):
    assert problems(text=TRAIN + f"model: {model}") == [told]


def test_a_preset_lies_below_the_users_keys(load):
    run = load(["model.num_layers=2", "model.rope_scaling.factor=4"], text=TRAIN + "model: {family: llama, size: llama3.1_8b, norm_eps: 1e-6}")
    assert (run.model.hidden_size, run.model.num_layers, run.model.norm_eps) == (4096, 2, 1e-6)
    assert (run.model.rope_scaling.kind, run.model.rope_scaling.factor) == ("llama3", 4.0)


@pytest.mark.parametrize("override, value", [
    ("train.steps=20", 20), ("train.steps=1e3", 1000), ("optim.lr=1e-3", 1e-3), ("parallel.zero1=true", True), ("run.dir=a/b=c", "a/b=c"),
    ("run.dir=2024", "2024"), ("data.train=[0.3,a,0.7,b]", ["0.3", "a", "0.7", "b"]), ("data.valid.pile=[x]", {"pile": ["x"]}),
    ("train.rampup.start=4", 4),
])
def test_overrides(load, override, value):
    extra = ["train.rampup={increment: 4, samples: 9}"] if "rampup" in override else []
    node = load([*extra, override])
    for key in override.split("=")[0].split(".")[: 3 if "rampup" in override else 2]:
        node = getattr(node, key)
    assert node == value


def test_the_last_override_wins(load):
    assert load(["train.steps=2", "train.steps=3"]).train.steps == 3


def test_overrides_that_cannot_be_read_are_told_together(problems):
    found = problems(["train.steps", "--train.steps=3", "train.steps=[1"])
    assert found[:2] == [f"override '{o}' is not of the form key=value, such as train.steps=100" for o in ("train.steps", "--train.steps=3")]
    assert found[2].startswith("override 'train.steps=[1': ") and len(found) == 3


@pytest.mark.parametrize("text, told", [
    ("- a\n", "holds no mapping of sections"), ("a: [", "while parsing a flow"), (BASE + "run: {dir: b}\n", "found duplicate key run"),
    ("run: {dir: '${nowhere}'}", "Interpolation key 'nowhere' not found"), (BASE + "1: 2\n", "keys should be strings"),
])
def test_files_that_are_no_configuration(problems, text, told):
    assert told in problems(text=text)[0]


def test_a_missing_or_binary_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file at .*none.yaml"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x9d")
    with pytest.raises(ConfigError, match="binary.yaml"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("value", ["nan", ".inf", "-1"])
def test_numbers_that_are_none_are_refused(problems, value):
    assert problems([f"optim.lr={value}"])[0].startswith("optim.lr=")


def test_sections_are_frozen(load):
    with pytest.raises(ValidationError, match="frozen"):
        load().train.steps = 3


ROUND_TRIPS = [
    [], [*MOE, "model.moe.balance=sinkhorn", "model.moe.top_k=1"], ["data.train=[0.3,a,0.7,b]", "data.valid.pile=[x,y]", "train.eval_samples=3"],
    ["run.dir=1e3", "log.wandb='on'", "optim.eps=1e-20", "optim.lr=0.1234567890123456"], ["stage=pretrain", "model.rope_scaling.kind=llama3"],
]


@pytest.mark.parametrize("overrides", ROUND_TRIPS)
def test_a_dumped_configuration_loads_as_itself(load, overrides):
    run = load(overrides)
    assert load(text=dump_config(run)) == run


@settings(max_examples=40, deadline=None)
@given(lr=st.floats(1e-12, 1e12), text=st.from_regex(re.compile(r"[A-Za-z0-9_.:/' #-]{0,20}"), fullmatch=True), seed=st.integers(0, 2**40))
def test_any_value_survives_the_round_trip(tmp_path_factory, lr, text, seed):
    raw = dict(run=dict(dir=text, seed=seed), model=dict(family="gpt2", size="small"), train=dict(seq_len=8, global_batch=1, steps=1),
               data=dict(train=[text]), optim=dict(lr=lr))
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(validate(raw)))
    assert load_config(path) == validate(raw)


def test_a_configuration_from_before_a_field_was_there_means_what_it_meant():
    """Fields that came with further model families: a checkpoint's config.yaml has none of them."""
    run = validate(dict(run=dict(dir="x"), model=dict(family="mixtral", size="8x7b", sliding_window=64, sliding_window_freq=3, qk_norm=True),
                        train=dict(seq_len=8, global_batch=1, steps=1), data=dict(train=["x"])))
    old = run.model_dump()
    for name in ("qk_norm_width", "norm_place", "full_attention_layers"):
        del old["model"][name]
    del old["model"]["moe"]["dense_layers"]
    model = RunConfig.model_validate(old).model
    assert (model.qk_norm_width, model.norm_place) == ("head", "pre") and all(model.moe_layers)
    assert model.window_layers == [(i + 1) % 3 != 0 for i in range(32)]


def test_the_configuration_is_there_at_once_and_without_torch():
    code = """if True:
        import time; start = time.process_time()      # CPU seconds: a busy machine must not fail this
        import engine.config, engine.checks, engine.schedule, engine.metrics, sys
        seconds = time.process_time() - start
        heavy = {"torch", "numpy", "megatron", "transformers"} & set(sys.modules)
        assert not heavy, heavy
        assert seconds < 1, seconds
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(engine.checks.__file__).parents[1])


@pytest.mark.parametrize("example, world_size", [
    ("llama3_8b/pretrain", 8), ("llama3_8b/pretrain", 64), ("llama3_70b/pretrain", 64), ("mixtral_8x7b/pretrain", 64), ("deepseek_v3/pretrain", 1024),
    ("long_context_128k/ladder", 64),
])
def test_examples_for_clusters_are_legal_where_they_say(example, world_size):
    path = Path(__file__).parents[1] / "examples" / f"{example}.yaml"
    load_config(path, world_size=world_size)
    with pytest.raises(ConfigError):
        load_config(path, world_size=world_size + 1)

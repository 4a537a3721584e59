"""What several configuration fields decide together: which layouts, batches and combinations are legal.

`cross_checks(run, world_size)` returns one sentence per mistake, each with the numbers and the cure. Pure arithmetic on a
RunConfig; nothing here touches a device or a process group, so an impossible layout costs no start-up.
Left out: limits that only data or a device can tell; those are raised where they are met.
"""

from engine import adapters, torch_only
from engine.config import Unreadable, nearest
from engine.schedule import planned_steps
from engine.stages import STAGES, TEXT, ladder

ONE_SHAPE = ("pretrain", "continued", "anneal")  # the stages whose training batches all have seq_len columns and micro_batch rows


def cross_checks(run, world_size: int | None) -> list[str]:
    """All mistakes in `run`, as sentences; world_size None skips what needs the number of ranks.

    Each check is a generator that ends early where it meets a field that was refused already (Unreadable), so checks are
    kept apart by the fields they need.
    """
    checks = (_stage, _heads, _query_groups, _head_split, _widths, _rope, _rope_scaling, _layers, _vocabulary, _sequence, _learned_positions,
              _experts, _expert_split, _expert_biases, _balance, _capacity, _moe_layers, _dense_layers, _groups, _windows, _qk_norm, _zero_centred, _latent, _local_rope, _mtp,
              _sequence_parallel, _overlap, _backend, _torch_only,
              _fp8, _cuda_graphs, _fp8_sizes, _precision_aware, _rampup, _warmup, _rates, _wsd, _corpora, _buffers, _eod, _validation, _stop_when, _phases, _frozen_parts, _something_learns,
              _replay, _caps, _by_source, _fim, _anneal, _average, _rollback, adapters.problems, ladder.problems, ladder.lengths, _profiled_steps)
    problems = [problem for check in checks for problem in _until_unreadable(check(run))]
    if world_size is not None:
        for check in (_world, _profile, _expert_world, _world_batch, _world_rampup):
            problems += _until_unreadable(check(run, world_size))
    if run.stage == "long_context":
        problems += _until_unreadable(_rungs(run, world_size, set(problems)))
    return problems


def _rungs(run, world_size: int | None, known: set[str]):
    """What is wrong with a rung of the ladder, as a run of its own, and has not been told about the whole run."""
    for i, rung in enumerate(ladder.rungs(run) if run.long_context.ladder else []):
        yield from (f"long_context.ladder.{i}: {problem}" for problem in cross_checks(rung, world_size) if problem not in known)


def _until_unreadable(problems):
    try:
        yield from problems
    except Unreadable:
        return


def divisors(n: int, limit: int = 64) -> str:
    """The divisors of n up to limit, for messages that offer the legal choices."""
    return ", ".join(str(d) for d in range(1, min(n, limit) + 1) if n % d == 0)


def _profile(run, world_size):
    absent = [rank for rank in run.profile.ranks if rank >= world_size]
    if run.profile.first_step and absent:
        yield f"profile.ranks names rank {absent[0]}, but the {world_size} ranks of this run are numbered from 0 to {world_size - 1}"


def _profiled_steps(run):
    first, trains = run.profile.first_step, [one.train for one in ladder.rungs(run)] if run.stage == "long_context" else [run.train]
    steps = max(train.steps if train.rampup.start else planned_steps(train) for train in trains)      # a ramp-up may be wrong itself
    if steps and first > steps:      # without steps nothing but validation is asked for
        yield (f"profile.first_step({first}) is after the last step of this run({steps}; steps before a resume count too), so nothing "
               f"would be profiled; set it to {steps} or less, or to 0")


def _stage(run):
    if run.stage not in STAGES and ":" not in run.stage:
        yield f"stage={run.stage} is unknown{nearest(run.stage, STAGES)}"


def _has_head_size(model) -> bool:
    return bool(model.is_latent or model.head_dim) or model.hidden_size % model.num_attention_heads == 0


def _heads(run):
    model = run.model
    if not _has_head_size(model):
        yield (f"model.hidden_size({model.hidden_size}) is not divisible by num_attention_heads({model.num_attention_heads}); "
               "set model.head_dim or change one of them")


def _query_groups(run):
    model = run.model
    if model.num_attention_heads % model.kv_heads:
        yield (f"model.num_attention_heads({model.num_attention_heads}) is not divisible by num_query_groups({model.kv_heads}); "
               f"legal num_query_groups: {divisors(model.num_attention_heads)}")


def _head_split(run):
    model, tp = run.model, run.parallel.tp
    if model.num_attention_heads % tp:
        yield (f"model.num_attention_heads({model.num_attention_heads}) is not divisible by parallel.tp({tp}); "
               f"legal tp: {divisors(model.num_attention_heads)}")
    elif model.kv_heads % tp:
        yield (f"model.num_query_groups({model.kv_heads}) is not divisible by parallel.tp({tp}); "
               f"legal tp: {divisors(model.kv_heads)}")


def _widths(run):
    model, tp = run.model, run.parallel.tp
    for name in ("ffn_hidden_size", "hidden_size"):
        if (width := getattr(model, name)) % tp:
            yield f"model.{name}({width}) is not divisible by parallel.tp({tp}); legal tp: {divisors(width)}"


def _rope(run):
    model = run.model
    if not _has_head_size(model):
        return      # told by _heads
    if model.position == "rope" and model.rope_dims % 2 and model.is_latent:
        yield f"RoPE rotates pairs, but model.mla.qk_rope_head_dim({model.rope_dims}) is odd; change it"
    elif model.position == "rope" and model.rope_dims % 2:
        yield f"RoPE rotates pairs, but head_dim({model.head_size}) * rope_percent({model.rope_percent}) is odd; change model.head_dim"


def _rope_scaling(run):
    model, scaling = run.model, run.model.rope_scaling
    if scaling.kind == "none" or not _has_head_size(model):
        return
    dims, original = model.rope_dims, scaling.original_max_position
    if model.position != "rope":
        yield f"model.rope_scaling.kind={scaling.kind} stretches RoPE, but model.position={model.position}; set kind=none"
    if scaling.kind in ("ntk", "dynamic") and dims < 4:
        yield f"model.rope_scaling.kind={scaling.kind} needs 4 rotated dims or more, but head_dim * rope_percent is {dims}; set kind=linear"
    if scaling.kind in ("yarn", "longrope") and original < 2:
        yield (f"model.rope_scaling.original_max_position({original}) has no logarithm to divide by in kind={scaling.kind}; set the length "
               "the model was first trained at")
    if scaling.kind == "yarn" and model.rope_theta <= 1:
        yield f"model.rope_scaling.kind=yarn needs model.rope_theta above 1, not {model.rope_theta:g}"
    if scaling.kind == "yarn" and scaling.factor * original < run.train.seq_len:
        yield (f"model.rope_scaling.factor({scaling.factor:g}) * original_max_position({original}) is shorter than "
               f"train.seq_len({run.train.seq_len}); raise factor to {run.train.seq_len / original:g}")
    if scaling.kind == "yarn" and scaling.beta_fast < scaling.beta_slow:
        yield (f"model.rope_scaling.beta_fast({scaling.beta_fast:g}) is below beta_slow({scaling.beta_slow:g}), but dims that turn more often "
               "are the ones to keep; swap them")
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (f"model.rope_scaling.high_freq_factor({scaling.high_freq_factor:g}) must exceed low_freq_factor({scaling.low_freq_factor:g}); "
               "raise it")
    for name in ("short_factor", "long_factor") if scaling.kind == "longrope" else ():
        factors = getattr(scaling, name)
        if len(factors) != dims // 2:
            yield (f"model.rope_scaling.{name} has {len(factors)} entries, but kind=longrope divides {dims // 2} pairs "
                   f"(head_dim({model.head_size}) * rope_percent({model.rope_percent:g}) / 2); give one each")
        if any(factor <= 0 for factor in factors):
            yield f"model.rope_scaling.{name} holds {min(factors):g}, but frequencies are divided by it; give positive numbers"


def _layers(run):
    layers, pp, vpp = run.model.num_layers, run.parallel.pp, run.parallel.vpp
    if vpp > 1 and pp == 1:
        yield f"parallel.vpp({vpp}) needs a pipeline; set parallel.pp to 2 or more, or vpp to 1"
    if given := run.parallel.pp_layers:
        if len(given) != pp * vpp:
            yield f"parallel.pp_layers has {len(given)} numbers, but parallel.pp({pp}) * vpp({vpp}) = {pp * vpp} chunks; give one for each"
        elif sum(given) != layers:
            yield f"parallel.pp_layers sums to {sum(given)}, but model.num_layers is {layers}; add or remove {abs(layers - sum(given))}"
    elif layers % (pp * vpp):
        yield (f"model.num_layers({layers}) is not divisible by parallel.pp({pp}) * vpp({vpp}) = {pp * vpp}; "
               f"legal pp * vpp: {divisors(layers)}; or say in parallel.pp_layers how many each chunk has")


def _vocabulary(run):
    model, tp = run.model, run.parallel.tp
    if model.padded_vocab_size % tp:
        yield (f"model.vocab_size({model.vocab_size}), padded to {model.padded_vocab_size}, is not divisible by parallel.tp({tp}); "
               f"set model.vocab_pad_multiple to a multiple of {tp}")


def _sequence(run):
    seq_len, p = run.train.seq_len, run.parallel
    if p.cp > 1 and seq_len % (2 * p.cp):
        yield (f"train.seq_len({seq_len}) is not divisible by 2 * parallel.cp({p.cp}) = {2 * p.cp} "
               f"(each rank holds two chunks); legal cp: {divisors(seq_len // 2) if seq_len % 2 == 0 else 1}")
    elif p.sequence_parallel and (seq_len // p.cp) % p.tp:
        yield (f"train.seq_len({seq_len}) / cp({p.cp}) is not divisible by tp({p.tp}), which sequence_parallel needs; "
               f"legal tp: {divisors(seq_len // p.cp)}")


def _learned_positions(run):
    seq_len = run.train.seq_len
    if run.model.max_position and seq_len > run.model.max_position and run.model.position == "learned":
        yield f"train.seq_len({seq_len}) exceeds model.max_position({run.model.max_position}) of the learned positions; raise it"


def _experts(run):
    moe, p = run.model.moe, run.parallel
    if not moe.num_experts:
        if p.ep > 1:
            yield f"parallel.ep({p.ep}) needs experts; set model.moe.num_experts, or ep to 1"
        if p.etp > 1 and p.etp != p.tp:
            yield f"parallel.etp({p.etp}) needs experts; set model.moe.num_experts, or etp to 0"
        return
    if moe.top_k > moe.num_experts:
        yield f"model.moe.top_k({moe.top_k}) exceeds num_experts({moe.num_experts}); lower top_k"
    if moe.num_experts % p.ep:
        yield (f"model.moe.num_experts({moe.num_experts}) is not divisible by parallel.ep({p.ep}); "
               f"legal ep: {divisors(moe.num_experts)}")


def _expert_split(run):
    moe, p = run.model.moe, run.parallel
    if not moe.num_experts:
        return
    if run.model.moe_ffn_hidden_size % p.expert_tp:
        yield (f"expert width({run.model.moe_ffn_hidden_size}) is not divisible by parallel.etp({p.expert_tp}); "
               f"legal etp: {divisors(run.model.moe_ffn_hidden_size)}")
    if moe.shared_expert_ffn_hidden_size % p.tp:
        yield (f"model.moe.shared_expert_ffn_hidden_size({moe.shared_expert_ffn_hidden_size}) is not divisible by "
               f"parallel.tp({p.tp}); legal tp: {divisors(moe.shared_expert_ffn_hidden_size)}")
    if p.tp > 1 and not p.sequence_parallel:
        yield f"experts under parallel.tp({p.tp}) need parallel.sequence_parallel=true"


def _expert_biases(run):
    model, p = run.model, run.parallel
    if not (model.moe.num_experts and model.linear_bias):
        return
    if model.moe.shared_expert_ffn_hidden_size:
        yield "model.linear_bias=true, but shared experts have no biases; set linear_bias=false or shared_expert_ffn_hidden_size=0"
    if p.expert_tp > 1:
        yield f"model.linear_bias=true: experts with biases cannot be split over parallel.etp({p.expert_tp}); set etp=1"


def _balance(run):
    moe = run.model.moe
    if not moe.num_experts:
        return
    if moe.balance == "aux_free" and moe.score != "sigmoid":
        yield f"model.moe.balance=aux_free biases sigmoid scores, but model.moe.score={moe.score}; set score=sigmoid"
    if moe.balance == "sinkhorn" and moe.top_k != 1:
        yield f"model.moe.balance=sinkhorn routes each token to one expert, but top_k={moe.top_k}; set top_k=1"


def _capacity(run):
    moe = run.model.moe
    if moe.num_experts and moe.pad_to_capacity and not moe.capacity_factor:
        yield "model.moe.pad_to_capacity needs a capacity_factor; set model.moe.capacity_factor, 1.0 say"
    elif moe.num_experts and moe.pad_to_capacity and moe.capacity_factor * moe.top_k > moe.num_experts:
        yield (f"model.moe.capacity_factor({moe.capacity_factor}) with pad_to_capacity makes room for more tokens than there are; it drops "
               f"nothing from num_experts({moe.num_experts}) / top_k({moe.top_k}) = {moe.num_experts / moe.top_k:g} on, so lower it to that")
    if moe.num_experts and moe.capacity_factor and moe.balance == "sinkhorn":
        yield f"model.moe.capacity_factor({moe.capacity_factor}) has no meaning for balance=sinkhorn, which fills experts evenly; set it to 0"


def _moe_layers(run):
    moe = run.model.moe
    if moe.num_experts and not any(run.model.moe_layers):
        yield (f"model.moe.num_experts({moe.num_experts}) but no layer is MoE: layer_freq({moe.layer_freq}), "
               f"first_dense_layers({moe.first_dense_layers}), dense_layers({moe.dense_layers}), num_layers({run.model.num_layers})")


def _dense_layers(run):
    beyond = [i for i in run.model.moe.dense_layers if i >= run.model.num_layers]
    if beyond:
        yield f"model.moe.dense_layers names {beyond}, but the last of num_layers({run.model.num_layers}) is {run.model.num_layers - 1}; leave them out"


def _windows(run):
    model = run.model
    if model.sliding_window and not any(model.window_layers):
        yield (f"model.sliding_window({model.sliding_window}) but no layer has it: full_attention_layers({model.full_attention_layers}), "
               f"sliding_window_freq({model.sliding_window_freq}), num_layers({model.num_layers})")


def _qk_norm(run):
    model = run.model
    if model.qk_norm and model.qk_norm_width == "all" and model.norm != "rmsnorm":
        yield f"model.qk_norm_width=all normalises over tp ranks with rmsnorm alone, but model.norm={model.norm}; set qk_norm_width=head"


def _zero_centred(run):
    model = run.model
    if model.norm_zero_centered and model.norm != "rmsnorm":
        yield f"model.norm_zero_centered=true is for rmsnorm, but model.norm={model.norm}; set it to false"
    if model.norm_zero_centered and model.qk_norm and model.qk_norm_width == "all":
        yield "model.norm_zero_centered=true: a norm over all heads (model.qk_norm_width=all) is not centred so; set qk_norm_width=head"


def _groups(run):
    moe = run.model.moe
    if not (moe.num_experts and moe.num_groups):
        return
    if moe.num_experts % moe.num_groups:
        yield (f"model.moe.num_experts({moe.num_experts}) is not divisible by num_groups({moe.num_groups}); "
               f"legal num_groups: {divisors(moe.num_experts)}")
        return
    size = moe.num_experts // moe.num_groups
    if not 1 <= moe.group_top_k <= moe.num_groups:
        yield f"model.moe.group_top_k({moe.group_top_k}) must be 1 to num_groups({moe.num_groups})"
    elif moe.top_k > moe.group_top_k * size:
        yield (f"model.moe.top_k({moe.top_k}) exceeds the {moe.group_top_k * size} experts of group_top_k({moe.group_top_k}) groups of {size}; "
               "raise group_top_k or lower top_k")
    if moe.group_score_top > size:
        yield f"model.moe.group_score_top({moe.group_score_top}) exceeds the {size} experts of a group; lower it"
    if moe.balance == "sinkhorn":
        yield "model.moe.num_groups limits a top-k choice, but balance=sinkhorn makes none; set num_groups=0"


def _latent(run):
    model, mla = run.model, run.model.mla
    if not model.is_latent:
        return
    taken = {f"head_dim({model.head_dim})": model.head_dim > 0, f"num_query_groups({model.num_query_groups})": model.kv_heads != model.num_attention_heads,
             "qkv_bias": model.qkv_bias, "linear_bias": model.linear_bias, "qk_norm": model.qk_norm,
             f"query_pre_attn_scalar({model.query_pre_attn_scalar:g})": model.query_pre_attn_scalar > 0,
             f"rope_percent({model.rope_percent})": model.rope_percent != 1, f"position({model.position})": model.position != "rope",
             f"sliding_window({model.sliding_window})": model.sliding_window > 0}
    for name in (name for name, is_set in taken.items() if is_set):
        yield f"model.{name} has no place in latent attention (model.mla.kv_lora_rank={mla.kv_lora_rank}), which has heads of its own; leave it out"


def _local_rope(run):
    model, kind = run.model, run.model.rope_scaling.kind
    if not model.rope_local_theta:
        return
    if not model.sliding_window or model.position != "rope":
        yield (f"model.rope_local_theta({model.rope_local_theta:g}) is the base period of layers with a sliding window, but sliding_window is "
               f"{model.sliding_window} and position={model.position}; set it to 0")
    if kind in ("yarn", "longrope"):
        yield f"model.rope_local_theta with rope_scaling.kind={kind}: its factor of cos and sin would reach all layers; set rope_local_theta=0, or another kind"


NEXT_TOKEN = (*TEXT, "sft")  # the stages whose loss is that of next tokens


def _mtp(run):
    model, mtp = run.model, run.model.mtp
    if not mtp.num_layers:
        return
    said = f"model.mtp.num_layers({mtp.num_layers})"
    if run.stage == "reward":
        yield f"{said}: stage=reward has one number per token and no further tokens; set it to 0, and a checkpoint's layers for them stay behind"
        return
    if model.position == "learned":
        yield f"{said}: learned positions are not kept beside these layers; set model.position=rope, or num_layers=0"
    if not mtp.loss_weight:
        return
    weight = f"model.mtp.loss_weight({mtp.loss_weight:g})"
    if run.stage in STAGES and run.stage not in NEXT_TOKEN:
        yield (f"{weight} is that of a loss beside next tokens' ({', '.join(NEXT_TOKEN)}), but stage={run.stage}; set it to 0, which keeps these "
               "layers as they are")
    if run.lora.rank:
        yield f"{weight}: with lora.rank({run.lora.rank}) nothing but adapters learns, and these layers have none; set it to 0, which keeps them as they are"
    if mtp.num_layers >= run.train.seq_len:
        yield f"{said} leaves no token of train.seq_len({run.train.seq_len}) to predict; lower it"


def _torch_only(run):
    parts = torch_only.reasons(run.model)
    for name in parts if run.train.backend == "te" else ():
        yield f"{name} exists for the torch layers alone; set train.backend=torch"
    if parts and run.train.fp8.recipe != "none":
        yield f"train.fp8.recipe={run.train.fp8.recipe} needs Transformer Engine, which has no {parts[0]} here; set it to none"
    if parts and run.parallel.tp_comm_overlap:
        yield f"parallel.tp_comm_overlap needs Transformer Engine, which has no {parts[0]} here; set it to false"


def _sequence_parallel(run):
    p = run.parallel
    if p.sequence_parallel and p.tp == 1:
        yield "parallel.sequence_parallel splits over tp ranks, but parallel.tp is 1; set tp >= 2 or sequence_parallel=false"


def _overlap(run):
    p = run.parallel
    if p.overlap_param_gather and not p.zero1:
        yield "parallel.overlap_param_gather gathers what zero1 has split; set parallel.zero1=true"
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        yield "parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true"


def _backend(run):
    train = run.train
    if run.run.device == "cpu" and train.backend == "te":
        yield "train.backend=te needs a GPU, but run.device=cpu; set train.backend=torch"
    if run.parallel.tp_comm_overlap and train.backend == "torch":
        yield "parallel.tp_comm_overlap needs Transformer Engine, but train.backend=torch"
    elif run.parallel.tp_comm_overlap and not run.parallel.sequence_parallel:
        yield "parallel.tp_comm_overlap overlaps the communication of sequence parallel; set parallel.sequence_parallel=true"
    for reason in _no_tp_overlap(run) if run.parallel.tp_comm_overlap else ():
        yield f"parallel.tp_comm_overlap {reason}; set it to false"


def _no_tp_overlap(run):
    """Its buffers have one size and Transformer Engine's names for them."""
    model, p = run.model, run.parallel
    if model.is_latent:
        yield (f"has no buffers for the projections of latent attention (model.mla.kv_lora_rank={model.mla.kv_lora_rank}), "
               "which are not as wide as hidden_size")
    if model.mtp.num_layers:
        yield f"has no buffer for the projection of model.mtp.num_layers({model.mtp.num_layers})"
    if run.stage not in (*ONE_SHAPE, "long_context"):  # whose own check says more
        yield f"has buffers for batches of one shape, which those of stage={run.stage} are not: it works with {', '.join(ONE_SHAPE)}"
    if run.train.precision != "bf16":
        yield f"adds what it receives as bf16, but train.precision={run.train.precision}"
    if p.tp & (p.tp - 1):
        yield f"has kernels for parallel.tp of 2, 4, 8 ..., not {p.tp}"


def _fp8(run):
    train = run.train
    if train.fp8.params and train.fp8.recipe == "none":
        yield "train.fp8.params keeps parameters in FP8, but train.fp8.recipe is none; choose a recipe"
    if train.fp8.recipe != "none" and train.backend == "torch":
        yield f"train.fp8.recipe={train.fp8.recipe} needs Transformer Engine, but train.backend=torch; set train.backend=te"
    if train.fp8.recipe != "none" and train.precision != "bf16":
        yield f"train.fp8.recipe={train.fp8.recipe} works beside bf16, but train.precision={train.precision}; set it to bf16"
    if train.fp8.params and train.fp8.recipe == "mxfp8":
        yield "train.fp8.params=true, but parameters of train.fp8.recipe=mxfp8 cannot share the buffer that is gathered; set params=false"
    if train.fp8.params and run.faults.replica_check_every:
        yield (f"faults.replica_check_every({run.faults.replica_check_every}) compares weights bit for bit, which train.fp8.params=true keeps in another form; "
               "set it to 0, or params=false")
    if train.fp8.params and train.fp8.recipe not in ("none", "mxfp8") and not run.parallel.zero1:
        yield "train.fp8.params keeps master weights in the optimizer of parallel.zero1; set zero1=true"


def _cuda_graphs(run):
    """A graph holds the kernels of one step of one shape: whatever could differ from step to step, or is not known to be recorded whole, is refused."""
    train, p, model = run.train, run.parallel, run.model
    if not train.cuda_graphs:
        return
    reasons = {
        f"stage={run.stage} has batches of several shapes, or several networks; it works with {', '.join(ONE_SHAPE)}": run.stage not in ONE_SHAPE,
        "train.backend=torch; graphs are recorded of Transformer Engine's layers": train.backend == "torch",
        "run.device=cpu": run.run.device == "cpu",
        f"parallel.pp({p.pp}): recording through a pipeline is not offered": p.pp > 1,
        f"parallel.cp({p.cp}): its attention runs on several streams": p.cp > 1,
        "parallel.tp_comm_overlap, which runs on streams of its own": p.tp_comm_overlap,
        f"model.moe.num_experts({model.moe.num_experts}): how many tokens an expert gets differs from step to step": model.moe.num_experts > 0,
        f"model.mla.kv_lora_rank({model.mla.kv_lora_rank}): recording latent attention is not offered": model.is_latent,
        "data.reset_at_eod: every batch has other documents": run.data.reset_at_eod,
        f"train.recompute={train.recompute}": train.recompute != "none",
        "train.compile": train.compile,
        f"model.hidden_dropout({model.hidden_dropout:g}): validation would replay it": model.hidden_dropout > 0,
        f"model.attention_dropout({model.attention_dropout:g}): validation would replay it": model.attention_dropout > 0,
        f"lora.rank({run.lora.rank}), whose layers are torch's": run.lora.rank > 0,
        f"model.rope_local_theta({model.rope_local_theta:g}): layers that turn by other angles are not recorded": model.rope_local_theta > 0,
        f"model.mtp.loss_weight({model.mtp.loss_weight:g}), whose layers run once more": model.mtp.num_learning > 0,
    }
    for reason in (reason for reason, is_so in reasons.items() if is_so):
        yield f"train.cuda_graphs does not go with {reason}; change that, or set train.cuda_graphs=false"
    for name in torch_only.reasons(model):
        yield f"train.cuda_graphs needs Transformer Engine, which has no {name} here; set it to false"


def _fp8_sizes(run):
    """What an FP8 matrix product asks of both of its dims: multiples of 16, of 32 under mxfp8."""
    model, p, train = run.model, run.parallel, run.train
    if train.fp8.recipe == "none" or model.num_attention_heads % p.tp or not _has_head_size(model):
        return
    multiple = 32 if train.fp8.recipe == "mxfp8" else 16
    sizes = {
        "model.hidden_size": model.hidden_size,
        **(_latent_sizes if model.is_latent else _head_sizes)(model, p.tp),
        "model.ffn_hidden_size / tp": model.ffn_hidden_size // p.tp,
        "expert width / etp": model.moe_ffn_hidden_size // p.expert_tp if model.moe.num_experts else 0,
        "model.moe.shared_expert_ffn_hidden_size / tp": model.moe.shared_expert_ffn_hidden_size // p.tp,
        "hidden_size / tp": model.hidden_size // p.tp if model.mtp.num_layers else 0,
        "tokens of a micro-batch per rank": train.seq_len * train.micro_batch // (p.cp * (p.tp if p.sequence_parallel else 1)),
    }
    wrong = [f"{name}({size})" for name, size in sizes.items() if size % multiple]
    if wrong:
        yield f"train.fp8.recipe={train.fp8.recipe} multiplies matrices whose dims are multiples of {multiple}, which {', '.join(wrong)} is not"


def _head_sizes(model, tp: int) -> dict[str, int]:
    """Of the matrices of an attention, by name, without hidden_size."""
    queries, kv = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    return {"num_attention_heads * head_dim / tp": queries // tp, "(num_attention_heads + 2 * num_query_groups) * head_dim / tp": (queries + 2 * kv) // tp}


def _latent_sizes(model, tp: int) -> dict[str, int]:
    """The same of latent attention."""
    mla, heads = model.mla, model.num_attention_heads // tp
    return {
        "model.mla.q_lora_rank": mla.q_lora_rank,
        "model.mla.kv_lora_rank": mla.kv_lora_rank,
        "mla.kv_lora_rank + qk_rope_head_dim": mla.kv_lora_rank + mla.qk_rope_head_dim,
        "num_attention_heads / tp * (mla.qk_nope_head_dim + qk_rope_head_dim)": heads * model.head_size,
        "num_attention_heads / tp * (mla.qk_nope_head_dim + v_head_dim)": heads * (mla.qk_nope_head_dim + mla.v_head_dim),
        "num_attention_heads / tp * mla.v_head_dim": heads * mla.v_head_dim,
    }


def _precision_aware(run):
    if run.optim.precision_aware and not run.parallel.zero1:
        yield "optim.precision_aware needs parallel.zero1=true"
    if run.optim.precision_aware and run.train.precision != "bf16":
        yield f"optim.precision_aware keeps gradients and moments in bf16, but train.precision={run.train.precision}; set it to bf16"


def _rampup(run):
    train, ramp = run.train, run.train.rampup
    if ramp.start:
        if ramp.start > train.global_batch:
            yield f"train.rampup.start({ramp.start}) exceeds train.global_batch({train.global_batch})"
        elif (train.global_batch - ramp.start) % ramp.increment:
            yield (f"train.rampup: global_batch({train.global_batch}) - start({ramp.start}) is not a multiple of "
                   f"increment({ramp.increment})")
        if not ramp.samples:
            yield "train.rampup.samples is 0; set the samples over which the batch grows"


def _warmup(run):
    schedule, steps = run.schedule, run.schedule.decay_steps or run.train.steps
    if not run.train.steps:
        return      # nothing but validation
    if schedule.kind != "constant" and schedule.warmup_steps >= steps:
        yield f"schedule.warmup_steps({schedule.warmup_steps}) leaves no step of the {steps} to decay; lower it"
    if schedule.kind == "inverse_sqrt" and not schedule.warmup_steps:
        yield "schedule.kind=inverse_sqrt scales with warmup_steps, which is 0; set it to 1 or more"


def _rates(run):
    schedule = run.schedule
    if schedule.warmup_steps and schedule.init_lr > run.optim.lr:
        yield f"schedule.init_lr({schedule.init_lr}) exceeds optim.lr({run.optim.lr}), so the warm-up would fall; lower init_lr"
    if schedule.min_lr > run.optim.lr and run.stage != "anneal":  # which takes its rate from the checkpoint, and checks it
        yield f"schedule.min_lr({schedule.min_lr}) exceeds optim.lr({run.optim.lr}); lower it"


def _wsd(run):
    schedule, steps = run.schedule, run.schedule.decay_steps or run.train.steps
    if schedule.kind == "wsd" and run.train.steps:
        if not schedule.wsd_decay_steps:
            yield "schedule.kind=wsd needs schedule.wsd_decay_steps, the length of the final decay"
        elif schedule.wsd_decay_steps + schedule.warmup_steps > steps:
            yield (f"schedule.wsd_decay_steps({schedule.wsd_decay_steps}) + warmup_steps({schedule.warmup_steps}) exceed "
                   f"the {steps} steps of the schedule")


def _corpora(run):
    data = run.data
    if not data.train:
        yield "data.train is empty; name at least one corpus prefix (data_tools/preprocess.py writes them)"
    if data.split and data.valid:
        yield "data.split cuts the validation set out of data.train, but data.valid names one too; use one of them"


READ_ELSEWHERE = (*TEXT, "sft", "reward")  # whose datasets nothing but loaders looks at: engine/stage.py, datasets_stay_with_reader


def _buffers(run):
    data = run.data
    if data.buffer == "pinned" and run.run.device == "cpu":
        yield "data.buffer=pinned is memory that a GPU copies from, but run.device=cpu; set data.buffer=auto"
    if data.buffer == "shared" and data.read_on != "first_rank":
        yield "data.buffer=shared passes batches from the rank that reads to the others, but data.read_on=every_rank; set data.read_on=first_rank"
    if data.read_on == "first_rank" and run.stage in STAGES and run.stage not in READ_ELSEWHERE:
        yield (f"data.read_on=first_rank is for {', '.join(READ_ELSEWHERE)}, but stage={run.stage} looks at its data on every rank; "
               "set data.read_on=every_rank")


def _eod(run):
    data = run.data
    if (data.reset_at_eod or data.eod_mask_loss) and data.eod_id < 0 and not data.tokenizer:
        yield "data.reset_at_eod and eod_mask_loss need the end-of-document token; set data.tokenizer or data.eod_id"
    if data.eod_id >= run.model.vocab_size:
        yield f"data.eod_id({data.eod_id}) is beyond model.vocab_size({run.model.vocab_size})"


def _validation(run):
    data = run.data
    if run.train.eval_every and not run.train.eval_samples:
        yield "train.eval_every is set but train.eval_samples is 0; set how many samples a validation reads"
    if run.train.eval_samples and not (data.valid or data.split):
        yield f"train.eval_samples({run.train.eval_samples}) but there is no validation set; set data.valid or data.split"


FREEZABLE = ("embedding", "output", "norms", "router", "experts", "layers", "layers:N", "layers:FIRST-LAST")


def _frozen_parts(run):
    layers = run.model.num_layers
    for part in run.tune.freeze:
        kind, _, span = part.partition(":")
        if (span and kind != "layers") or kind not in FREEZABLE:
            yield f"tune.freeze names {part}; known: {', '.join(FREEZABLE)}"
        elif span:
            ends = span.split("-")
            if not (1 <= len(ends) <= 2 and all(end.isdigit() for end in ends) and int(ends[0]) <= int(ends[-1]) < layers):
                yield f"tune.freeze names {part}, but the model has layers 0 to {layers - 1}; write layers:0-{layers - 1} or layers:0"


def _something_learns(run):
    wanted = {"embedding", "layers", "norms"} | (set() if run.model.tie_embeddings else {"output"})
    if wanted <= set(run.tune.freeze):
        yield f"tune.freeze({', '.join(run.tune.freeze)}) leaves nothing that could learn; leave one of them out"


MIXING = ("pretrain", "continued", "anneal")  # the stages whose corpora may change during a run


def _phases(run):
    phases = run.data.phases
    if phases and run.stage in STAGES and run.stage not in MIXING:
        yield f"data.phases changes the corpora of {', '.join(MIXING)}, but stage={run.stage}; remove it"
    if phases and not phases[0].after_tokens and not phases[0].ramp_tokens:
        yield "data.phases.0 replaces data.train before its first token; put its list into data.train, or give it after_tokens or ramp_tokens"
    for i, phase in enumerate(phases):
        if not phase.train:
            yield f"data.phases.{i}.train is empty; name at least one corpus prefix"
    for i, (before, phase) in enumerate(zip(phases, phases[1:]), start=1):
        end = before.after_tokens + before.ramp_tokens
        if phase.after_tokens < end:
            yield (f"data.phases.{i} begins after {phase.after_tokens} tokens, while data.phases.{i - 1} changes until {end}; "
                   "list phases in order of time, or shorten the ramp")
        elif phase.after_tokens == before.after_tokens:
            yield f"data.phases.{i} begins after {phase.after_tokens} tokens, like data.phases.{i - 1}; remove one of them"


def _replay(run):
    data = run.data
    if data.replay and run.stage in STAGES and run.stage != "continued":
        yield f"data.replay is read by stage continued, but stage={run.stage}; put its corpora into data.train, or set stage=continued"
    elif data.replay and not data.replay_share:
        yield "data.replay is given but data.replay_share is 0; set the share of samples to take from it, or remove data.replay"


def _caps(run):
    data = run.data
    if data.max_epochs and run.stage in STAGES and run.stage not in MIXING:
        yield f"data.max_epochs limits the corpora of {', '.join(MIXING)}, but stage={run.stage}; remove it"
    if data.max_epochs and data.one_epoch:
        yield "data.one_epoch refuses to read a token twice and data.max_epochs says how often one may be read; use one of them"


def _by_source(run):
    for name in ("valid_by_source", "train_by_source"):
        if getattr(run.data, name) and run.stage in STAGES and run.stage not in TEXT:
            yield f"data.{name} tells the losses of corpora of text ({', '.join(TEXT)}), but stage={run.stage}; remove it"


def _fim(run):
    data, fim = run.data, run.data.fim
    if not fim.rate:
        return
    if run.stage in STAGES and run.stage not in TEXT:
        yield f"data.fim changes text of {', '.join(TEXT)}, but stage={run.stage}; remove it"
    if data.eod_id < 0 and not data.tokenizer:
        yield "data.fim changes documents one by one and needs the token that ends them; set data.tokenizer or data.eod_id"
    ids = [fim.prefix_id, fim.middle_id, fim.suffix_id]
    said = f"data.fim.prefix_id({ids[0]}), middle_id({ids[1]}) and suffix_id({ids[2]})"
    if min(ids) < 0 or max(ids) >= run.model.vocab_size:
        yield f"{said} must be tokens of model.vocab_size({run.model.vocab_size}) that text does not use; set those of the tokenizer"
    elif len({*ids, data.eod_id}) < 4:
        yield f"{said} must differ from each other and from data.eod_id({data.eod_id})"


def _anneal(run):
    if run.stage == "anneal" and run.schedule.warmup_steps:
        yield f"stage=anneal has no warm-up, but schedule.warmup_steps({run.schedule.warmup_steps}); set it to 0, or take stage=continued"


def _rollback(run):
    if run.faults.spike == "rollback" and not run.checkpoint.save_every:
        yield "faults.spike=rollback goes back to a checkpoint, but checkpoint.save_every is 0; set it, or faults.spike=skip"


def _average(run):
    average, steps = run.average, run.train.steps
    if average.kind == "none" or not steps:
        return
    if steps - steps % average.every <= average.start * steps:
        yield (f"average.every({average.every}) after average.start({average.start}) of {steps} steps takes no weights; "
               "lower one of them, or set average.kind=none")
    if run.train.fp8.params:
        yield "average.kind needs parameters in plain precision, but train.fp8.params=true; set one of them otherwise"


def _stop_when(run):
    goal, train = run.train.stop_when, run.train
    if not goal.metric:
        return
    if goal.at_most is None and goal.at_least is None:
        yield f"train.stop_when.metric={goal.metric} has no limit; give at_most or at_least"
    if not (train.eval_every and train.eval_samples):
        yield (f"train.stop_when waits for validations, but train.eval_every is {train.eval_every} and eval_samples {train.eval_samples}; "
               "set both above 0")
    if goal.set and run.data.valid and goal.set not in run.data.valid:
        yield f"train.stop_when.set={goal.set} is no validation set; data.valid has {', '.join(run.data.valid)}"


def _world(run, world_size: int):
    p = run.parallel
    model_ranks = _model_ranks(run)
    if world_size % model_ranks:
        fewer = world_size < model_ranks
        yield (f"tp({p.tp}) * pp({p.pp}) * cp({p.cp}) = {model_ranks} does not divide the world size {world_size}; "
               + (f"start {model_ranks} ranks or a multiple (torchrun --nproc-per-node)" if fewer else
                  f"start a multiple of {model_ranks} ranks, or choose a product among {divisors(world_size, world_size)}"))


def _model_ranks(run) -> int:
    return run.parallel.tp * run.parallel.pp * run.parallel.cp


def _expert_world(run, world_size: int):
    p = run.parallel
    if not run.model.moe.num_experts or world_size % _model_ranks(run):
        return
    expert_ranks = p.expert_tp * p.ep * p.pp
    if world_size % expert_ranks:
        yield (f"etp({p.expert_tp}) * ep({p.ep}) * pp({p.pp}) = {expert_ranks} does not divide the world size "
               f"{world_size}; legal ep: {divisors(max(world_size // (p.expert_tp * p.pp), 1))}")


def _world_batch(run, world_size: int):
    if world_size % _model_ranks(run):
        return      # dp is not known
    p, train, dp = run.parallel, run.train, world_size // _model_ranks(run)
    micro = train.micro_batch * dp
    if train.global_batch % micro:
        yield (f"train.global_batch({train.global_batch}) is not divisible by micro_batch({train.micro_batch}) * dp({dp}) = {micro}; "
               f"legal global_batch: multiples of {micro}")
    elif p.vpp > 1 and (train.global_batch // micro) % p.pp:
        yield (f"train.global_batch({train.global_batch}) makes {train.global_batch // micro} micro-batches, which the interleaved "
               f"schedule needs divisible by parallel.pp({p.pp}); legal global_batch: multiples of {micro * p.pp}")


def _world_rampup(run, world_size: int):
    if world_size % _model_ranks(run):
        return
    p, ramp = run.parallel, run.train.rampup
    step = run.train.micro_batch * (world_size // _model_ranks(run)) * (p.pp if p.vpp > 1 else 1)
    if ramp.start and (ramp.start % step or ramp.increment % step):
        yield (f"train.rampup.start({ramp.start}) and increment({ramp.increment}) must be multiples of {step} "
               "(micro_batch * dp, times pp when interleaved)")

"""From a RunConfig to model chunks: megatron's TransformerConfig, GPTModel, initial weights, DDP and optimizer.

    chunks = build_model(run, topology)              # one per virtual pipeline chunk, wrapped for data parallel
    optimizer = build_optimizer(run, chunks)

Initial weights do not depend on the layout: each parameter is drawn whole from a generator seeded by its name and sliced,
so the same run.seed starts the same model on any number of ranks.
Left out: which parameters learn, and how fast (tune.py), and adapters (lora.py).
"""

import functools
import hashlib
import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

from engine import adapters
from engine.mcore import lora, mtp, norms, rotary, te_problem, tune
from engine.mcore.group_limit import limit_groups
from engine.mcore.output_layer import OutputLayer
from engine.mcore.quantized import plain_parameters
from engine.rope import softmax_scale
from engine.torch_only import reasons

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of gates (gates.py) only what megatron checks and its fused kernels go by; of them geglu's is the tanh form too.
ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "clamped_swiglu": F.silu, "gelu": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu,
               "squared_relu": squared_relu, "silu": F.silu}


def backend_of(run, device: str) -> str:
    """"te" or "torch", as train.backend asks; auto takes te on a GPU that can import it.

    Raises ValueError when te is asked for and cannot be had, with the reason.
    """
    # Adapters and some parts of models exist for its layers alone; engine/adapters.py and engine/checks.py refuse te by name.
    if run.train.backend == "torch" or run.lora.rank or reasons(run.model):
        return "torch"
    problem = "there is no GPU" if device == "cpu" else te_problem
    if run.train.backend == "te" and problem:
        raise ValueError(f"train.backend=te, but {problem}; set train.backend=torch, or install Transformer Engine (docs/gpu.md)")
    if run.train.cuda_graphs and problem:
        raise ValueError(f"train.cuda_graphs needs Transformer Engine, but {problem}; set it to false")
    if run.train.fp8.recipe != "none" and problem:
        raise ValueError(f"train.fp8.recipe={run.train.fp8.recipe} needs Transformer Engine, but {problem}; set it to none")
    if run.parallel.tp_comm_overlap and problem:
        raise ValueError(f"parallel.tp_comm_overlap needs Transformer Engine, but {problem}; set it to false")
    return "torch" if problem else "te"


def transformer_config(run, device: str) -> TransformerConfig:
    """megatron's TransformerConfig for this run on this device."""
    model, p, train = run.model, run.parallel, run.train
    on_te = backend_of(run, device) == "te"
    # megatron's kernels, which in experts weight their output too; it has none for a clamped gate of any steepness, nor for biases.
    is_fused = on_te and not model.linear_bias and (model.activation == "swiglu" or model.activation == "geglu" and not model.moe.num_experts)
    dtype = DTYPES[train.precision]
    # FP8 parameters record the largest value they are given, so what they hold before init_weights must be finite.
    init = torch.nn.init.zeros_ if train.fp8.params else _leave
    return TransformerConfig(
        num_layers=model.num_layers,
        mtp_num_layers=model.mtp.num_learning or None,  # has megatron keep an embedding on the last pp rank
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_size,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm],
        layernorm_epsilon=model.norm_eps,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm and model.qk_norm_width == "head",  # norms.py has the others: megatron sums gradients of these over tp
        softmax_scale=softmax_scale(model),
        softmax_type="learnable" if model.attention_sinks and on_te else "vanilla",
        layernorm_zero_centered_gamma=model.norm_zero_centered,
        window_size=(model.sliding_window - 1, 0) if model.sliding_window else None,
        window_attn_skip_freq=None if not model.sliding_window or all(model.window_layers) else [
            int(flag) for flag in model.window_layers + model.mtp.num_layers * model.window_layers[-1:]],
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        # init_weights fills the parameters; megatron still has to run its own init, which marks them as split over tp.
        init_method=init,
        output_layer_init_method=init,
        embedding_init_method=init,
        apply_query_key_layer_scaling=False,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        pipeline_model_parallel_layout=_chunks(p.pp_layers, model.mtp.num_learning),
        context_parallel_size=p.cp,
        cp_comm_type="all_gather" if model.sliding_window else "p2p",  # te's ring has no sliding window; torch always gathers
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.expert_tp,
        sequence_parallel=p.sequence_parallel,
        # With two pp ranks, batched sends between the same pair cross and gradients are silently wrong; upstream asks for pp > 2.
        overlap_p2p_comm=p.vpp > 1 and (p.overlap_p2p or p.pp == 2),
        batch_p2p_comm=not (p.vpp > 1 and (p.overlap_p2p or p.pp == 2)),
        # gloo reads a sent tensor after the call returns; freeing it under an overlapped send corrupts what arrives.
        deallocate_pipeline_outputs=device == "cuda",
        calculate_per_token_loss=True,  # DDP then sums gradients; run.py divides the loss by the global count beforehand
        deterministic_mode=run.run.deterministic,
        bias_activation_fusion=is_fused,
        bias_dropout_fusion=on_te and not (model.moe.num_experts and model.linear_bias),  # grouped experts with biases refuse it
        apply_rope_fusion=on_te,
        masked_softmax_fusion=False,
        persist_layer_norm=on_te,
        gradient_accumulation_fusion=on_te,
        use_te_activation_func=model.gated and not is_fused,  # gates.py
        tp_comm_overlap=p.tp_comm_overlap,
        **(dict(cuda_graph_impl="local", cuda_graph_scope=[]) if train.cuda_graphs and on_te else {}),  # [] is the whole layer
        **_recompute(train),
        **_experts(run, on_te),
        **_fp8(train.fp8),
    )


def learns_further(model) -> bool:
    """Are there layers for further tokens, with a loss of their own?"""
    return model.mtp.num_learning > 0


def _chunks(pp_layers: list[int], num_further: int) -> list[list[str]] | None:
    """megatron's layout of a pipeline whose chunks are not alike."""
    if not pp_layers:
        return None
    layout = [["decoder"] * num for num in pp_layers]
    layout[0].insert(0, "embedding")
    layout[-1] += ["mtp"] * num_further + ["loss"]
    return layout


def _leave(tensor):
    return tensor


def _recompute(train) -> dict:
    if train.recompute == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return dict(recompute_granularity="selective") if train.recompute == "selective" else {}


def _fp8(fp8) -> dict:
    if fp8.recipe == "none":
        return {}
    return dict(fp8=fp8.format, fp8_recipe=fp8.recipe, fp8_param=fp8.params, fp8_amax_history_len=fp8.amax_history,
                fp8_amax_compute_algo="max")


def _experts(run, on_te: bool) -> dict:
    model, moe = run.model, run.model.moe
    if not moe.num_experts:
        return {}
    with_loss = moe.balance in ("aux_loss", "seq_aux_loss", "global_aux_loss") and moe.aux_loss_coeff > 0
    # The global loss is one value for all dp ranks, each of which adds its share of it, and DDP sums shares as it sums losses.
    coeff = moe.aux_loss_coeff * (mpu.get_data_parallel_world_size() if moe.balance == "global_aux_loss" else 1)
    return dict(
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_expert_ffn_hidden_size or None,
        moe_layer_freq=[int(flag) for flag in model.moe_layers],
        moe_router_load_balancing_type=moe.balance if with_loss or moe.balance == "sinkhorn" else "none",
        moe_aux_loss_coeff=coeff if with_loss else 0.0,
        moe_z_loss_coeff=moe.z_loss_coeff or None,
        moe_router_enable_expert_bias=moe.balance == "aux_free",
        moe_router_bias_update_rate=0.0 if run.lora.rank or "router" in run.tune.freeze else moe.bias_update_rate,
        moe_router_score_function=moe.score,
        moe_router_pre_softmax=not moe.softmax_after_top_k and moe.score == "softmax",
        moe_router_topk_scaling_factor=moe.scaling_factor or None,
        moe_router_dtype="fp32",
        moe_expert_capacity_factor=moe.capacity_factor or None,
        moe_pad_expert_input_to_capacity=moe.pad_to_capacity,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=moe.grouped_gemm and on_te,
        moe_permute_fusion=moe.permute_fusion and on_te,
    )


class Network(GPTModel):
    """GPTModel with the heads stages ask for: given labels it returns one number per token.

    head tokens: log p(label), computed chunk by chunk (linear_ce.py) without the padding of the vocabulary, at the places `asked` alone
    (None: all), of the distribution at `temperature`; with its entropy, [b, s, 2], while `wants_entropy`; 1 or 0 while `is_greedy`: is the label
    the most probable token? head scalar: the value of each token.
    proportions: what the gradient of log p(label) at the places asked will be, up to a factor, or None.
    Given `further` (mtp.targets of the micro-batch, its own `asked` and `proportions`), it leaves their log p(label) in `further_output` meanwhile.
    """

    is_greedy = wants_entropy = False
    temperature = 1.0
    asked = proportions = further = further_output = None  # of the micro-batch at hand

    def __init__(self, *args, model, mtp_block_spec, **kwargs):
        is_tied, learns = model.tie_embeddings and model.head == "tokens", learns_further(model)
        super().__init__(*args, share_embeddings_and_output_weights=is_tied, mtp_block_spec=mtp_block_spec if learns else None, **kwargs)
        if mtp_block_spec and not learns:  # they are kept, and need no embedding here
            self.mtp = MultiTokenPredictionBlock(config=self.config, spec=mtp_block_spec, vp_stage=self.vp_stage)
        if mtp_block_spec and learns and is_tied and not self.pre_process:
            self.output_layer.weight = None  # what is shared is the embedding beside it; megatron means that, and makes two
        self.real_vocab_size, self.head = model.vocab_size, model.head
        if not self.post_process:
            return
        if model.head == "scalar":
            del self.output_layer
            self.value_head = ValueHead(self.config)
            return
        self.output_layer.__class__ = OutputLayer  # megatron has no spec for this layer; its parameters and state stay
        self.output_layer.softcap = model.logits_softcap
        self.output_layer.gradient_accumulation_fusion = False  # apex's, where the logits themselves are differentiated

    def _postprocess(self, hidden_states, labels=None, **kwargs):
        """Hidden states [s, b, h] -> fp32 [b, s]; without labels logits, as megatron's."""
        if not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        if self.head == "scalar":
            return self.value_head(hidden_states)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if labels is None:
            logits, _ = self.output_layer(hidden_states, weight=tied, runtime_gather_output=kwargs.get("runtime_gather_output"))
            return logits.transpose(0, 1).contiguous()
        if self.further:
            self.further_output = self._further(hidden_states, tied, **kwargs)
        is_capped = self.output_layer.softcap > 0
        if self.temperature != 1.0 and not is_capped:
            hidden_states = hidden_states / self.temperature  # the output layer has no bias: so are the logits
        return self.output_layer(hidden_states, weight=tied, labels=labels, num_real=self.real_vocab_size, is_greedy=self.is_greedy,
                                 asked=self.asked, with_entropy=self.wants_entropy, temperature=self.temperature if is_capped else 1.0,
                                 proportions=self.proportions)

    def _further(self, hidden_states, tied, *, position_ids, attention_mask, rotary_pos_emb, packed_seq_params, **_):
        """Hidden states [s, b, h] of the main model -> log p of further_labels, fp32 [D * b, s]."""
        states = self.mtp(input_ids=self.further["further_tokens"], position_ids=position_ids, hidden_states=hidden_states,
                          attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, embedding=self.embedding)
        _, *further = states.chunk(1 + len(self.mtp.layers))
        return self.output_layer(torch.cat(further, 1), weight=tied, labels=self.further["further_labels"], num_real=self.real_vocab_size,
                                 asked=self.further.get("further_asked"), proportions=self.further.get("further_proportions"))

    def sharded_state_dict(self, *args, **kwargs):
        has_output, self.post_process = self.post_process, self.post_process and self.head == "tokens"
        try:
            return super().sharded_state_dict(*args, **kwargs)  # which wants an output matrix wherever post_process says so
        finally:
            self.post_process = has_output


class ValueHead(MegatronModule):
    """One number per token: a row vector, the same on every tp rank."""

    def __init__(self, config):
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))

    def forward(self, hidden):
        """[s, b, h], or this tp rank's part of the sequence -> fp32 [b, s]."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return F.linear(hidden, self.weight).squeeze(-1).t().float()


def build_chunk(run, config: TransformerConfig, device: str, vp_stage: int | None = None, with_weights: bool = True) -> GPTModel:
    """One bare model chunk of this pp rank, with layout-free initial weights (or whatever memory holds), in the run's precision."""
    if backend_of(run, device) == "te":
        from engine.mcore.spec_te import BACKEND, block_spec
    else:
        from engine.mcore.spec_torch import BACKEND, block_spec
    model = run.model
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    layers = block_spec(config, model, vp_stage)
    chunk = Network(
        config=config,
        transformer_layer_spec=layers,
        mtp_block_spec=mtp.block_spec(layers.layer_specs[-1], model.mtp.num_layers, BACKEND) if is_last and model.mtp.num_layers else None,
        vocab_size=model.padded_vocab_size,
        model=model,
        max_sequence_length=model.max_position or run.train.seq_len,
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=is_last,
        position_embedding_type={"learned": "learned_absolute"}.get(model.position, model.position),
        rotary_percent=model.rope_percent,
        rotary_base=model.rope_theta,
        vp_stage=vp_stage,
    )
    rotary.install(chunk, model)
    limit_groups(chunk, model)
    if model.scale_embeddings and hasattr(chunk, "embedding"):
        chunk.embedding.register_forward_hook(_times_root_of_width)
    _mark_experts(chunk, run.parallel)
    lora.adapt(chunk, run)
    if with_weights:
        init_weights(chunk, run)
    chunk.cuda(torch.cuda.current_device())
    return Float16Module(config, chunk) if run.train.precision != "fp32" else chunk


def _times_root_of_width(module, inputs, embeddings):
    """Embeddings [s, b, h] times sqrt(h), a factor in their dtype (Gemma)."""
    return embeddings * torch.tensor(embeddings.size(-1) ** 0.5, dtype=embeddings.dtype).item()


def _mark_experts(chunk, parallel) -> None:
    """Reduce expert gradients over the expert-data-parallel group whenever it differs from the dense one.

    megatron does so only when ep > 1; with ep = 1 and etp < tp it would leave tp ranks with different experts. And it would sum the gradient of
    an expert's second bias over the tp ranks once more, as it does for dense layers under sequence parallel.
    """
    for name, parameter in chunk.named_parameters():
        if ".experts." in name and ".shared_experts." not in name:
            parameter.sequence_parallel = False
            if parallel.expert_tp == 1:
                parameter.tensor_model_parallel = True  # no copy, which megatron would count in the norm on one tp rank alone: such biases
            if parallel.ep > 1 or parallel.expert_tp != parallel.tp:
                parameter.allreduce = False


@torch.no_grad()
def init_weights(chunk: GPTModel, run) -> None:
    """Fill every parameter: norms 1, biases 0, matrices normal(0, std); each drawn whole by name, then sliced.

    Residual outputs (attention projection, second MLP matrix) get std / sqrt(2 * layers), as in GPT-2 and megatron.
    """
    with plain_parameters(chunk):
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)})
        apply_factories(state)
        for shard in sharded_tensors(state):
            name, data = shard.key, shard.data
            if adapters.MARK in name:
                _draw(shard, functools.partial(lora.fill, name), run.run.seed)
            elif name.endswith("bias"):
                data.zero_()
            elif "layernorm" in name or "layer_norm" in name or name.endswith(("enorm.weight", "hnorm.weight")):
                data.fill_(0.0 if run.model.norm_zero_centered else 1.0)
            else:
                residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                std = run.model.init_std / math.sqrt(2 * run.model.num_layers) if residual else run.model.init_std
                _draw(shard, functools.partial(_normal, std), run.run.seed)
    lora.start_magnitudes(chunk)


def sharded_tensors(state):
    """Every ShardedTensor in a nested state dict (factories applied)."""
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, (dict, list)):
            yield from sharded_tensors(value)


def _normal(std: float, whole, generator) -> None:
    whole.normal_(0, std, generator=generator)


def _draw(shard: ShardedTensor, fill, seed: int) -> None:
    """Fill shard.data with its slice of what fill(whole, generator) draws for the whole tensor of one layer (and expert)."""
    lead = shard.prepend_axis_num  # axes that count layers and experts
    where, shape, offset = shard.global_offset[:lead], shard.global_shape[lead:], shard.global_offset[lead:]
    digest = hashlib.sha256(f"{seed}/{shard.key}/{where}".encode()).digest()
    generator = torch.Generator(device=shard.data.device).manual_seed(int.from_bytes(digest[:7], "big"))
    whole = torch.empty(shape, device=shard.data.device)
    fill(whole, generator)
    local = shard.data.view(shard.local_shape[lead:] if len(shard.local_shape) > len(shape) else shard.local_shape)
    local.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, local.shape))])


def for_role(run, train: bool, head: str, adapters_of=None):
    """The run as one role of a stage sees it: its head, no layers for further tokens where it does not learn or has no tokens, and where it does
    not learn the adapters that its weights come with.

    adapters_of: the Lora section of the checkpoint that a frozen role loads; None where there is none.
    """
    model = {} if run.model.head == head else {"head": head}
    if run.model.mtp.num_layers and (not train or head == "scalar"):
        model["mtp"] = type(run.model.mtp)()
    update = {"model": run.model.model_copy(update=model)} if model else {}
    if not train and run.lora.rank:
        update["train"] = run.train.model_copy(update={"backend": "torch"})  # the backend of the adapted role: they are compared
    if not train:
        update["train"] = update.get("train", run.train).model_copy(update={"cuda_graphs": False})
        update["lora"] = adapters_of or type(run.lora)()
    return run.model_copy(update=update) if update else run


def build_model(run, device: str, train: bool = True) -> list:
    """This rank's model chunks: wrapped in megatron's DDP, ready to train, or bare and without gradients."""
    config = transformer_config(run, device)
    stages = range(run.parallel.vpp) if run.parallel.vpp > 1 else [None]
    chunks = [build_chunk(run, config, device, vp_stage) for vp_stage in stages]
    if run.train.compile:
        for chunk in chunks:
            compile_layers(chunk)
    if not train:
        return [chunk.requires_grad_(False) for chunk in chunks]
    for chunk in chunks:
        tune.mark(bare(chunk), run)
    # The interleaved schedule starts gathers for all chunks at once; without it each module's forward starts the next one's.
    align_gather = run.parallel.overlap_param_gather and run.parallel.vpp > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not run.optim.precision_aware,
        overlap_grad_reduce=run.parallel.overlap_grad_reduce,
        overlap_param_gather=run.parallel.overlap_param_gather,
        align_param_gather=align_gather,
        use_distributed_optimizer=run.parallel.zero1,
        fp8_param_gather=run.train.fp8.params,
        check_for_nan_in_grad=False,  # run.py looks at the global norm before the weights change
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    config.finalize_model_grads_func = _finalize
    if run.parallel.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        if run.parallel.vpp > 1:
            starts = [chunk.start_grad_sync for chunk in wrapped]
            config.grad_sync_func = starts
    if align_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
    return wrapped


def _finalize(chunks, num_tokens=None, **kwargs):
    """megatron's gradient reductions without its division by tokens: the loss was divided before the backward pass."""
    finalize_model_grads(chunks, None, **kwargs)


def compile_layers(chunk) -> None:
    """torch.compile each layer's forward in place; parameter names stay as they are."""
    module = chunk.module if isinstance(chunk, Float16Module) else chunk
    for layer in mtp.transformer_layers(module):
        for part in layer.modules():
            if isinstance(part, norms.WholeNorm):  # the compiler cannot trace a sum over ranks and its gradient's in a row
                part.forward = torch.compiler.disable(part.forward)
        layer.forward = torch.compile(layer.forward)


def build_optimizer(run, chunks):
    """megatron's optimizer (ChainedOptimizer) over the chunks: AdamW with fp32 master weights, ZeRO-1 if asked.

    Raises ValueError when optim.precision_aware asks for Transformer Engine's FusedAdam and there is none.
    """
    optim, train = run.optim, run.train
    if optim.precision_aware and te_problem:
        raise ValueError(f"optim.precision_aware needs Transformer Engine's optimizer, but {te_problem}; set it to false")
    low = torch.bfloat16 if optim.precision_aware else torch.float32
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        fp16=train.precision == "fp16",
        bf16=train.precision == "bf16",
        params_dtype=DTYPES[train.precision],
        loss_scale=optim.loss_scale or None,
        initial_loss_scale=optim.initial_loss_scale,
        loss_scale_window=optim.loss_scale_window,
        use_distributed_optimizer=run.parallel.zero1,
        overlap_param_gather=run.parallel.overlap_param_gather,
        fp8_recipe=train.fp8.recipe if train.fp8.params else None,  # how master weights become parameters
        use_precision_aware_optimizer=optim.precision_aware,
        main_grads_dtype=low,
        exp_avg_dtype=low,
        exp_avg_sq_dtype=low,
        store_param_remainders=False,  # whole fp32 masters, so that a checkpoint is the same with and without
    )
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=tune.group_overrides(config, run), use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers[1:]:
        part.grad_scaler = getattr(optimizer.chained_optimizers[0], "grad_scaler", None)  # one loss, one scale; see run.py
    for group in optimizer.param_groups:
        # megatron leaves this to its scheduler, which is not used here; without it norms and biases would decay too.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    for part in torch_adams(optimizer):
        for group in part.param_groups:
            group["fused"] = True  # one pass over memory per step, on CPU and GPU alike
            for parameter in group["params"]:
                # megatron's sharded optimizer state wants the step count of torch's AdamW to exist before the first step.
                part.state[parameter] = {"step": torch.zeros((), device=parameter.device), "exp_avg": torch.zeros_like(parameter),
                                         "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def torch_adams(optimizer) -> list[torch.optim.AdamW]:
    """The torch optimizers inside megatron's; none where Transformer Engine's FusedAdam is in use."""
    inner = [getattr(part, "optimizer", None) for part in optimizer.chained_optimizers]
    return [part for part in inner if isinstance(part, torch.optim.AdamW)]


def one_rank(run):
    """The same run on a single CPU rank, for conversion and comparison."""
    from engine.config import Parallel

    return run.model_copy(update={
        "parallel": Parallel(),
        "run": run.run.model_copy(update={"device": "cpu"}),
        "train": run.train.model_copy(update={"precision": "fp32", "backend": "torch", "compile": False, "cuda_graphs": False, "recompute": "none",
                                              "fp8": type(run.train.fp8)()}),
    })


@torch.no_grad()
def fill(chunk, tensors) -> None:
    """Copy whole tensors, by GPTModel name, into an unsharded chunk.

    Raises ValueError naming every missing, unexpected and misshapen tensor.
    """
    own = {name: value for name, value in chunk.state_dict().items() if value is not None and not name.endswith("_extra_state")}
    problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        value = tensors[name]
        if value.shape != own[name].shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, the model wants {tuple(own[name].shape)}")
        else:
            own[name].copy_(value)
    if problems:
        raise ValueError("the tensors do not fit the model: " + "; ".join(sorted(problems)))


def single_rank_network(run, tensors):
    """A function from tokens [b, s] to logits fp32 [b, s, vocab_size]: whole tensors, computed in fp32 on one CPU rank; with a scalar head to
    values [b, s, 1]."""
    from engine.mcore import topology

    topology.start_single()
    run = one_rank(run)
    chunk = build_chunk(run, transformer_config(run, "cpu"), "cpu", with_weights=False)
    fill(chunk, tensors)
    chunk.eval()

    @torch.no_grad()
    def network(tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        output = chunk(tokens, positions, None)
        return output[..., None] if run.model.head == "scalar" else output[..., :run.model.vocab_size].float()

    return network


def single_rank_logits(run, tensors, tokens: torch.Tensor) -> torch.Tensor:
    """Logits fp32 [b, s, vocab_size] of whole tensors for tokens [b, s], computed in fp32 on one CPU rank."""
    return single_rank_network(run, tensors)(tokens)


def bare(chunk) -> GPTModel:
    """The GPTModel inside megatron's wrappers (DDP, Float16Module)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk

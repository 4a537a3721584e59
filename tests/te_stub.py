"""A stand-in for Transformer Engine in plain torch, so that megatron's wrappers of it and our te backend run on one CPU rank.

    python tests/te_stub.py      # trains pairs of runs, te against torch; prints one JSON object for tests/test_te_backend.py

It has the names, shapes, layouts and side effects that megatron relies on, read in Transformer Engine 2.20: packed documents
(thd), weight gradients added straight to main_grad, `_extra_state`, an Adam whose state appears in its first step.
It must be in sys.modules before megatron is imported, hence the process of its own. Left out: FP8, tensor parallel, speed.
"""

import json
import os
import pickle
import sys
import tempfile
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn import Parameter


class _Module(torch.nn.Module):
    """What every layer keeps for FP8: nothing here."""

    fp8 = fp8_calibration = False

    def __init__(self):
        super().__init__()
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0, "state of FP8 where there is none"


class _FusedProduct(torch.autograd.Function):
    """x @ w^T whose backward pass adds the gradient of w to w.main_grad and hands autograd a dummy."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        ctx.weight.main_grad.add_(grad.reshape(-1, grad.size(-1)).t() @ x.reshape(-1, x.size(-1)))
        ctx.weight.grad_added_to_main_grad = True
        return grad @ weight, torch.full_like(weight, float("nan"))


def _product(x, weight, bias, is_fused):
    y = _FusedProduct.apply(x, weight) if is_fused else x @ weight.t()
    return y if bias is None else y + bias


def _norm(x, weight, bias, eps, around_zero=False):
    if around_zero:  # in fp32, whatever x is
        return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps) if bias is None else F.layer_norm(x, weight.shape, weight, bias, eps)


class Linear(_Module):
    def __init__(self, in_features, out_features, *, init_method, bias, return_bias, parallel_mode, fuse_wgrad_accumulation, tp_size,
                 params_dtype, **_):
        super().__init__()
        assert tp_size == 1, "this stand-in is for one rank"
        self.parallel_mode, self.return_bias, self.use_bias, self.fuse = parallel_mode, return_bias, bias, fuse_wgrad_accumulation
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        init_method(self.weight)
        self.weight.tensor_model_parallel = True  # whatever parallel_mode is
        self.bias = Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None
        if bias and parallel_mode == "column":
            self.bias.tensor_model_parallel = True

    def forward(self, x, is_first_microbatch=None):
        y = _product(x, self.weight, None if self.return_bias else self.bias, self.fuse)
        return (y, self.bias) if self.return_bias else y


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, normalization, eps, params_dtype, zero_centered_gamma, **kwargs):
        super().__init__(in_features, out_features, params_dtype=params_dtype, **kwargs)
        self.eps, self.around_zero = eps, zero_centered_gamma
        self.layer_norm_weight = Parameter(torch.ones(in_features, dtype=params_dtype))
        self.layer_norm_bias = Parameter(torch.zeros(in_features, dtype=params_dtype)) if normalization == "LayerNorm" else None

    def forward(self, x, is_first_microbatch=None):
        return super().forward(_norm(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.around_zero))


class GroupedLinear(_Module):
    def __init__(self, num_gemms, in_features, out_features, *, init_method, bias, return_bias, fuse_wgrad_accumulation, params_dtype, **_):
        super().__init__()
        self.num_gemms, self.use_bias, self.return_bias, self.fuse, self.in_features, self.out_features = num_gemms, bias, return_bias, fuse_wgrad_accumulation, in_features, out_features
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", Parameter(torch.empty(out_features, in_features, dtype=params_dtype)))
            init_method(getattr(self, f"weight{i}"))
            if bias:
                self.register_parameter(f"bias{i}", Parameter(torch.zeros(out_features, dtype=params_dtype)))

    def forward(self, x, m_splits, is_first_microbatch=None):
        biases = [getattr(self, f"bias{i}") if self.use_bias else None for i in range(self.num_gemms)]
        y = torch.cat([_product(piece, getattr(self, f"weight{i}"), None if self.return_bias else biases[i], self.fuse)
                       for i, piece in enumerate(x.split(list(m_splits)))])
        return (y, biases) if self.return_bias else y


class RMSNorm(_Module):
    def __init__(self, hidden_size, eps, sequence_parallel, params_dtype, zero_centered_gamma, **_):
        super().__init__()
        self.eps, self.around_zero = eps, zero_centered_gamma
        self.weight = Parameter(torch.ones(hidden_size, dtype=params_dtype))
        self.register_parameter("bias", None)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return _norm(x, self.weight, self.bias, self.eps, self.around_zero)


class LayerNorm(RMSNorm):
    def __init__(self, hidden_size, eps, sequence_parallel, params_dtype, zero_centered_gamma, **_):
        super().__init__(hidden_size, eps, sequence_parallel, params_dtype, zero_centered_gamma)
        self.bias = Parameter(torch.zeros(hidden_size, dtype=params_dtype))


class DotProductAttention(_Module):
    calls: list = []

    def __init__(self, num_attention_heads, kv_channels, *, softmax_scale=None, window_size=None, tp_size=1, softmax_type="vanilla", **_):
        super().__init__()
        self.softmax_offset = Parameter(torch.zeros(num_attention_heads // tp_size)) if softmax_type == "learnable" else None
        self.register_load_state_dict_post_hook(self._without_extra_state)
        self.dims = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.scale, self.window = softmax_scale or self.dims[0] ** -0.5, window_size

    @staticmethod
    def _without_extra_state(module, incompatible):
        for key in [key for key in incompatible.missing_keys if "core_attention._extra_state" in key]:
            incompatible.missing_keys.remove(key)

    def forward(self, q, k, v, attention_mask, *, attn_mask_type, qkv_format="sbhd", cu_seqlens_q=None, cu_seqlens_kv=None,
                cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None):
        assert attention_mask is None
        assert (q.size(-1), k.size(-1), v.size(-1)) == (self.dims[0], *self.dims)
        assert self.dims[0] == self.dims[1] or all(x.is_contiguous() for x in (q, k, v)), "the fused kernel wants q, k and v apart"
        self.calls.append((qkv_format, attn_mask_type))
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal" and q.dim() == 4
            return torch.cat([self._causal(*(x[:, row] for x in (q, k, v)))[:, None] for row in range(q.size(1))], dim=1)
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and q.dim() == k.dim() == 3
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv) and cu_seqlens_q_padded is None
        bounds = cu_seqlens_q.tolist()
        lengths = [b - a for a, b in zip(bounds, bounds[1:])]
        assert bounds[0] == 0 and bounds[-1] == len(q) and min(lengths) > 0
        assert type(max_seqlen_q) is int and max_seqlen_q == max_seqlen_kv == max(lengths)
        return torch.cat([self._causal(*(x[a:b] for x in (q, k, v))) for a, b in zip(bounds, bounds[1:])])

    def _causal(self, q, k, v):
        """q and k [s, heads or kv_heads, d], v [s, kv_heads, v] -> [s, heads * v]"""
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        mask = (distance >= 0) & (distance <= self.window[0] if self.window else True)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        if self.softmax_offset is not None:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
            logits = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~mask, float("-inf"))
            sinks = self.softmax_offset.to(logits.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            return (torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ v)[0].transpose(0, 1).reshape(q.size(2), -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(q.size(2), -1)


def apply_rotary_pos_emb(t, freqs, tensor_format="sbhd", interleaved=False, fused=False, cu_seqlens=None, cp_size=1, cp_rank=0):
    """t [s, b, heads, d] or [tokens, heads, d]; freqs [length, 1, 1, r]."""
    assert fused and not interleaved and cp_size == 1 and freqs.is_contiguous()
    if tensor_format == "thd":
        bounds = cu_seqlens.tolist()
        return torch.cat([apply_rotary_pos_emb(t[a:b, None], freqs, "sbhd", fused=True)[:, 0] for a, b in zip(bounds, bounds[1:])])
    angles, turned, rest = freqs[:len(t)], t[..., :freqs.size(-1)], t[..., freqs.size(-1):]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([(turned * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(t.dtype), rest], dim=-1)


def _row_id_map(routing_map):
    """bool [tokens, experts] -> int32 [tokens, 2 * experts + 1]: of each token the rows of its n experts among all rows in the order of experts, from
    place `experts` on those experts, and n last."""
    num_tokens, num_experts = routing_map.shape
    rows = (routing_map.t().flatten().cumsum(0) - 1).view(num_experts, num_tokens).t().masked_fill(~routing_map, -1)
    rows, experts = rows.sort(dim=1, descending=True)
    return torch.cat([rows, experts.masked_fill(rows < 0, -1), routing_map.sum(1, keepdim=True)], 1).int()


def _chosen(row_id_map):
    """Of each row that is a token's: (token, expert, row)."""
    experts = (row_id_map.size(1) - 1) // 2
    tokens, places = torch.nonzero(row_id_map[:, :experts] >= 0, as_tuple=True)
    return tokens, row_id_map[tokens, experts + places].long(), row_id_map[tokens, places].long()


def moe_permute_with_probs(inp, probs, routing_map, num_out_tokens):
    """inp [tokens, h], probs and routing_map [tokens, experts] -> the rows of each expert in the order of tokens [num_out_tokens, h], their probs, a map
    for moe_unpermute. Rows of probability 0 are padding, and are zeros."""
    permuted.add("permute")
    assert routing_map.dtype == torch.bool and int(num_out_tokens) == routing_map.sum() > 0
    row_id_map = _row_id_map(routing_map)
    tokens, experts, rows = _chosen(row_id_map)
    order = rows.argsort()
    chosen = probs[tokens[order], experts[order]]
    return torch.where(chosen[:, None] == 0, 0, inp[tokens[order]]), chosen, row_id_map


def moe_permute(inp, routing_map, num_out_tokens):
    rows, _, row_id_map = moe_permute_with_probs(inp, routing_map.float(), routing_map, num_out_tokens)
    return rows, row_id_map


def moe_unpermute(inp, row_id_map, merging_probs=None, restore_shape=None):
    """Each token's rows of inp summed in fp32: [tokens, h]."""
    permuted.add("unpermute")
    assert merging_probs is None
    tokens, _, rows = _chosen(row_id_map)
    return torch.zeros(restore_shape).index_add(0, tokens, inp[rows].float()).to(inp.dtype)


def moe_sort_chunks_by_index(inp, split_sizes, sorted_index):
    """Pieces of these numbers of rows, in another order."""
    permuted.add("sort_chunks")
    pieces = inp.split(split_sizes.tolist())
    return torch.cat([pieces[i] for i in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    return moe_sort_chunks_by_index(inp, split_sizes, sorted_index), moe_sort_chunks_by_index(probs, split_sizes, sorted_index)


permuted: set[str] = set()  # which of these were called


class FusedAdam(torch.optim.Optimizer):
    """AdamW that makes its state in its first step, counts steps per group, and may keep masters and moments itself."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode, master_weights=False, master_weight_dtype=torch.float32,
                 exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32, use_decoupled_grad=False, store_param_remainders=False):
        assert adam_w_mode and not store_param_remainders
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.decoupled_grad = None

    def initialize_state(self, parameter, store_param_remainders):
        names = ("exp_avg", "exp_avg_sq") + ("master_param",) * self.master_weights
        for name in names:
            value = parameter.detach().clone() if name == "master_param" else torch.zeros_like(parameter)
            self.state[parameter][name] = value.to(self.dtypes[name])

    def get_unscaled_state(self, parameter, name):
        return self.state[parameter][name]

    def set_scaled_state(self, parameter, name, value):
        self.state[parameter][name] = value.to(self.dtypes[name], copy=True)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            (b1, b2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.initialize_state(parameter, False)
                grad = (parameter.decoupled_grad if self.use_decoupled_grad else parameter.grad).float()
                state = self.state[parameter]
                m = state["exp_avg"].float().lerp_(grad, 1 - b1)
                v = state["exp_avg_sq"].float().mul_(b2).addcmul_(grad, grad, value=1 - b2)
                w = state.get("master_param", parameter).float()
                w = w * (1 - lr * group["weight_decay"]) - lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + group["eps"])
                for name, value in (("exp_avg", m), ("exp_avg_sq", v), ("master_param", w)):
                    if name in state:
                        state[name].copy_(value)
                parameter.copy_(w)


def install() -> None:
    """Put the stand-in where `import transformer_engine` finds it."""

    def module(name: str, **names):
        made = types.ModuleType(name)
        vars(made).update(names)
        made.__path__ = []
        sys.modules[name] = made
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)

    empty = lambda name: type(name, (), {})  # noqa: E731
    module("transformer_engine", __version__="2.20.2")
    module("transformer_engine.common")
    module("transformer_engine.common.recipe", **{name: empty(name) for name in ("DelayedScaling", "Recipe")})
    module("transformer_engine.pytorch", **{c.__name__: c for c in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, LayerNorm, DotProductAttention)})
    module("transformer_engine.pytorch.ops", Sequential=empty("Sequential"), FusibleOperation=empty("FusibleOperation"))
    module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=empty("FP8GlobalStateManager"), fp8_autocast=None)
    module("transformer_engine.pytorch.distributed", CudaRNGStatesTracker=empty("CudaRNGStatesTracker"), activation_recompute_forward=None)
    module("transformer_engine.pytorch.tensor", QuantizedTensor=empty("QuantizedTensor"))
    module("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam, FusedSGD=empty("FusedSGD"))
    module("transformer_engine.pytorch.attention")
    module("transformer_engine.pytorch.attention.rope", apply_rotary_pos_emb=apply_rotary_pos_emb)
    module("transformer_engine.pytorch.permutation", **{function.__name__: function for function in (
        moe_permute, moe_permute_with_probs, moe_unpermute, moe_sort_chunks_by_index, moe_sort_chunks_by_index_with_probs)})
    module("transformer_engine.pytorch.router", **dict.fromkeys(
        ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")))


# --- the runs ------------------------------------------------------------------------------------------------------------

STEPS = 4
VARIED = {
    "latent": ("latent", {}),
    "latent yarn": ("latent", {"model": {"rope_scaling": dict(kind="yarn", factor=4.0, original_max_position=16, mscale=1.0, mscale_all_dim=1.0)}}),
    "latent post": ("latent", {"model": {"norm_place": "post"}}),
    "latent without q_lora": ("latent", {"model": {"mla": dict(kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=12)}}),
    "latent-moe": ("latent-moe", {}),
    "latent-moe-mtp": ("latent-moe-mtp", {}),
    "gemma without caps": ("gemma", {"model": {"attention_softcap": 0.0}}),
    "moe-sinks": ("moe-sinks", {}),
    "dense sinks": ("window", {"model": {"attention_sinks": True, "activation": "clamped_swiglu", "swiglu_limit": 0.5}}),
    "swiglu with biases": ("dense", {"model": {"linear_bias": True}}),
    "geglu experts": ("moe-mixed", {"model": {"activation": "geglu"}}),
}


def network(model: str, backend: str, /, **sections):
    """A network of parity_table.MODELS on this rank, as `backend` builds it."""
    import parity_table
    from engine.config import RunConfig
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    plain = parity_table.config(model, {}, {}, 1).model_dump()
    plain["run"]["device"] = "auto"
    plain["train"]["backend"] = backend
    for name, fields in sections.items():
        plain[name].update(fields)
    run = RunConfig.model_validate(plain)
    return ParallelModel(run, topology.start(run), parity_table.CountTokens(), "policy")


def train(model, first: int, last: int, documents: bool = True) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps first to last - 1, with document masks or without."""
    import parity_table

    lines = []
    for step in range(first, last):
        batches = parity_table.batches(model.run, 0, 1, step)
        if not documents:
            batches = [{name: tensor for name, tensor in batch.items() if name != "segment_ids"} for batch in batches]
        lines.append((model.forward_backward(batches).loss, model.step(lr=1e-3)))
    return lines


def moved(model: str, writer: str, reader: str, **sections) -> dict:
    """Half the steps by one backend and, through a checkpoint, half by another, beside all steps by the writer."""
    from engine.mcore import checkpoint

    whole = train(network(model, writer, **sections), 0, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        first = network(model, writer, **sections)
        lines = train(first, 0, STEPS // 2)
        saved = checkpoint.save(first, folder, checkpoint.Position(step=STEPS // 2))
        second = network(model, reader, **sections)
        checkpoint.load(second, saved)
        return {"unbroken": whole, "broken": lines + train(second, STEPS // 2, STEPS)}


def untrained(**sections) -> dict:
    """A checkpoint before the first step, when the optimizer has no state of its own yet."""
    from engine.mcore import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoint.save(network("dense", "te", **sections), folder, checkpoint.Position())
        second = network("dense", "te", **sections)
        checkpoint.load(second, saved)
        return {"unbroken": train(network("dense", "te", **sections), 0, 2), "broken": train(second, 0, 2)}


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    torch.set_num_threads(1)
    install()
    import parity_table
    from engine.mcore import build, checkpoint, run, spec_te  # noqa: F401

    sys.modules["transformer_engine"] = None  # megatron has what it wants; topology.start would refuse it on a CPU
    build.te_problem = ""
    build.backend_of = lambda run, device: run.train.backend
    zero1 = {"parallel": {"zero1": True}, "train": {"precision": "bf16"}}
    low = {**zero1, "optim": {"precision_aware": True}}
    found = {name: {backend: train(network(name, backend), 0, STEPS, documents=name != "tied") for backend in ("torch", "te")}
             for name in ("dense", "tied", "tied-mtp", "window", "post", "gpt2", "moe-mixed", "moe-both")}
    found["permuted"] = sorted(permuted)
    permuted.clear()
    plainly = {"model": {**parity_table.MODELS["moe-mixed"], "moe": {**parity_table.MODELS["moe-mixed"]["moe"], "permute_fusion": False}}}
    found["permuted plainly"] = {"losses": train(network("moe-mixed", "te", **plainly), 0, STEPS), "fused": sorted(permuted)}
    for name, (model, sections) in VARIED.items():
        found[name] = {backend: train(network(model, backend, **sections), 0, STEPS) for backend in ("torch", "te")}
    found["latent recomputed"] = {how: train(network("latent-moe", "te", train={"backend": "te", "recompute": how}), 0, STEPS)
                                  for how in ("none", "selective", "full")}
    found["answers"] = {name: {backend: answers(VARIED[name][0], backend, **VARIED[name][1]) for backend in ("torch", "te")}
                        for name in ("latent yarn", "gemma without caps", "moe-sinks")}
    found["formats"] = sorted(set(DotProductAttention.calls))
    found["layers"] = layer_classes(network("moe-mixed", "te"))
    found["latent layers"] = layer_classes(network("latent-moe", "te"))
    found["fp8 state"] = fp8_state()
    found["split over tp"] = split_over_tp(network("latent-moe", "te")) + split_over_tp(network("moe-sinks", "te"))
    zero1, low = ({**sections, "train": {**sections["train"], "backend": "te"}} for sections in (zero1, low))
    found["moved"] = {
        "te to torch": moved("moe-mixed", "te", "torch"), "torch to te": moved("moe-mixed", "torch", "te"),
        "latent te to torch": moved("latent-moe-mtp", "te", "torch"), "latent torch to te": moved("latent-moe-mtp", "torch", "te"),
        "sinks te to torch": moved("moe-sinks", "te", "torch"), "sinks torch to te": moved("moe-sinks", "torch", "te"),
        "zero1": moved("dense", "te", "te", **zero1), "precision aware": moved("dense", "te", "te", **low),
        "untrained": untrained(), "untrained precision aware": untrained(**low),
    }
    print(json.dumps(found))


def answers(model: str, backend: str, /, **sections) -> list[list[float]]:
    """log p of the tokens drawn greedily after two prompts; te's attention stands aside for one that has a key cache."""
    from engine.sampling import Sampling

    drawn = network(model, backend, **sections).generate([[3, 1, 4, 1, 5], [2, 7]], Sampling(max_new_tokens=6, temperature=0.0))
    return [answer.logps for answer in drawn]


def fp8_state() -> list:
    """[What grouped experts save of a recipe without scales, is megatron's own recipe of delayed scaling still there when a state has been read]."""
    from engine.mcore import safe_load
    from megatron.core.extensions.transformer_engine import TEDelayedScaling, TEGroupedLinear

    layer = types.SimpleNamespace(fp8_meta={"fp8_checkpoint": True, "recipe": None}, fp8=True, fp8_calibration=False, num_gemms=3)
    layer._decode_extra_state = types.MethodType(TEGroupedLinear._decode_extra_state, layer)
    parts = TEGroupedLinear._split_extra_state(layer, torch.empty(0, dtype=torch.uint8))
    recipe = object.__new__(TEDelayedScaling)
    recipe.margin = 3
    safe_load.te_problem = ""
    written = torch.frombuffer(bytearray(pickle.dumps({"recipe": recipe})), dtype=torch.uint8)
    found = pickle.loads(safe_load.clean_fp8_state(written).numpy().tobytes())["recipe"]
    return [[part.numel() for part in parts], type(found) is TEDelayedScaling and found.margin == 3]


def split_over_tp(model) -> list[str]:
    """The weights of an attention that megatron takes for a part of one that is split over tp ranks."""
    from engine.mcore.build import bare

    attention = bare(model.chunks[0]).decoder.layers[0].self_attention
    return sorted(name for name, parameter in attention.named_parameters() if getattr(parameter, "tensor_model_parallel", False))


def layer_classes(model) -> list[dict[str, str]]:
    """Which class stands where, layer by layer."""
    from engine.mcore.build import bare

    wanted = ("input_layernorm", *(f"self_attention.{name}" for name in (
        "linear_qkv", "linear_q_down_proj", "q_layernorm", "linear_q_up_proj", "linear_kv_down_proj", "kv_layernorm", "linear_kv_up_proj",
        "core_attention", "linear_proj")), "pre_mlp_layernorm", "mlp", "mlp.experts", "mlp.experts.linear_fc1", "mlp.linear_fc1")
    return [{name: type(dict(layer.named_modules())[name]).__name__ for name in wanted if name in dict(layer.named_modules())}
            for layer in bare(model.chunks[0]).decoder.layers]


if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # megatron's fused activations, uncompiled
    main()

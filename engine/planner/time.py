"""Seconds of one optimizer step of a layout, by what they are spent on.

    spent = step_time(run, cluster, "te")          # StepTime: gemm, attention, ..., total
    rate = tflops(run, cluster, spent.total)       # model TFLOP/s per GPU by Megatron's formula (engine/metrics.py)

Every product of a layer is taken at its size against the GPU's peak and its memory bandwidth; attention by the FLOPs that its mask leaves; the
rest of a layer by the bytes it moves; traffic of each axis by volume over the slowest wire it crosses, less what runs beside compute. The pp rank
with the most to do sets the pace; the pipeline's bubble is (pp - 1) / vpp of its micro-batches (arXiv 2104.04473, sec. 2.2).
Left out: reading data, checkpoints, validation, and GPUs that fail.
"""

import math
from dataclasses import dataclass

from engine import metrics
from engine.planner import constants as c
from engine.planner.activations import Saved
from engine.planner.cluster import Cluster
from engine.planner.memory import micro_batches
from engine.planner.weights import alike, chunks, count_kinds, learning


@dataclass(frozen=True)
class StepTime:
    """Seconds. tp, cp, ep, pp, dp: traffic of an axis that nothing hides; elementwise: norms, activations, dispatch of tokens and the like; overhead:
    kernels the host is late with, and the slowest of many nodes."""

    gemm: float
    attention: float
    elementwise: float
    tp: float
    cp: float
    ep: float
    pp: float
    bubble: float
    dp: float
    optimizer: float
    overhead: float

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return dict(vars(self))


def tflops(run, cluster: Cluster, seconds: float) -> float:
    """Model TFLOP/s of each GPU; recomputation and padding do not count."""
    flops = metrics.step_flops(run.model, run.train.seq_len, run.train.global_batch)
    return metrics.tflops_per_device(flops, seconds, cluster.num_gpus)


@dataclass(frozen=True)
class Dispatch:
    """How a run moves tokens to experts, where that is not this engine's way (megatron's all-to-all: top_k copies of each token, nothing beside
    them). once_per_node: a token crosses the network once for each node that holds experts of its, and is copied there over the links (DeepEP;
    arXiv 2412.19437, sec. 3.2.2); sends_fp8: dispatched in one byte, combined in bf16 (sec. 3.3.3); is_overlapped: beside the computation of another
    micro-batch (megatron's overlap_moe_expert_parallel_comm, DualPipe); is_dualpipe: that schedule's bubble (table 2)."""

    once_per_node: bool = False
    sends_fp8: bool = False
    is_overlapped: bool = False
    is_dualpipe: bool = False


OURS = Dispatch()


def step_time(run, cluster: Cluster, backend: str, dispatch: Dispatch = OURS) -> StepTime:
    return _Step(run, cluster, backend, dispatch).time()


class _Step:
    def __init__(self, run, cluster: Cluster, backend: str, dispatch: Dispatch):
        self.dispatch, self.is_fp8 = dispatch, run.train.fp8.recipe != "none" and backend == "te"
        self.run, self.cluster, self.backend, self.model, self.p = run, cluster, backend, run.model, run.parallel
        self.saved = Saved(run, backend)      # for its token counts
        self.bytes = self.saved.bytes
        gpu = cluster.gpu
        self.peak = gpu.tflops * 1e12 * c.GEMM_SHARE * (c.FP32_SHARE if run.train.precision == "fp32" else 1)
        self.layer_peak = gpu.fp8_tflops * 1e12 * c.FP8_SHARE if self.is_fp8 else self.peak
        self.memory = gpu.memory_gbs * 1e9 * c.MEMORY_SHARE
        self.recompute = run.train.recompute

    # --- one step -----------------------------------------------------------------------------------------------------

    def time(self) -> StepTime:
        p, num = self.p, micro_batches(self.run, self.cluster.num_gpus)
        busiest = max((self._stage(chunks(self.run)[rank]) for rank in alike(self.run)), key=lambda parts: sum(parts.values()))
        one = sum(busiest.values())      # seconds of one micro-batch, forward and backward
        parts = {name: num * seconds for name, seconds in busiest.items()}
        # DualPipe: (pp / 2 - 1) of a pair of passes and a backward pass less three for weights: of thirds of `one` that is 1 + 2/3 - 1.
        parts["bubble"] = (p.pp / 2 - 1) * one * 2 / 3 if self.dispatch.is_dualpipe else (p.pp - 1) / p.vpp * one
        parts["dp"], parts["optimizer"] = self._gradients(one), self._optimizer()
        nodes = math.log2(max(self.cluster.num_nodes, 1))
        parts["overhead"] += c.STRAGGLER_SHARE * nodes * sum(parts.values())
        return StepTime(**parts)

    def _stage(self, own) -> dict[str, float]:
        """One micro-batch on one pp rank, forward and backward."""
        parts = dict.fromkeys(("gemm", "attention", "elementwise", "tp", "cp", "ep", "pp", "overhead"), 0.0)
        for kind, num in count_kinds(self.model, own).items():
            for name, seconds in self._layer(*kind).items():
                parts[name] += num * seconds
        further = self.model.mtp.num_learning
        if own[-1].is_last and self.model.head == "tokens":
            rows, width = self.saved.tokens, self.model.padded_vocab_size // self.p.tp
            parts["gemm"] += 3 * (1 + further) * self._product(rows, self.model.hidden_size, width, self.peak)
            parts["elementwise"] += 6 * (1 + further) * rows * width * self.bytes / self.memory
            parts["tp"] += 2 * (1 + further) * self._over_tp()
        if own[-1].is_last and further:      # whose layers are counted with the others
            for name, seconds in self._further_module().items():
                parts[name] += further * seconds
        if own[0].is_first:
            parts["elementwise"] += 4 * self.saved.stream * self.model.hidden_size * self.bytes / self.memory
        if self.p.pp > 1:
            parts["pp"] += self._between_stages()
        return parts

    def _further_module(self) -> dict[str, float]:
        """A module for a further token, but for its transformer layer: the embedding, norms and the product that joins them."""
        s, h, again = self.saved, self.model.hidden_size, self.recompute == "full"
        # Forward it gathers both inputs and the outputs; backward gradients are scattered, and both inputs gathered for the weight's.
        exposed = 3 * (1 + again) + 5 * c.BACKWARD_TP if self.p.sequence_parallel else 1 + again + 4 * c.BACKWARD_TP
        return {"gemm": (3 + again) * self._product(s.tokens, 2 * h, h // self.p.tp, self.layer_peak),
                "elementwise": (4 + (3 + again) * 12) * s.stream * h * self.bytes / self.memory,      # three norms and a copy into one tensor
                "tp": (2 + exposed) * self._over_tp()}

    # --- one layer ----------------------------------------------------------------------------------------------------

    def _layer(self, is_moe: bool, is_windowed: bool) -> dict[str, float]:
        gemm = sum(num * self._product(*size, self.layer_peak) for num, *size in self._products(is_moe))
        attention = self._attention(is_windowed)
        moved = self._moved(is_moe)
        again = {"full": 1, "selective": 0, "none": 0}[self.recompute]
        passes = 3 + again      # a backward pass is twice a forward pass
        parts = {
            "gemm": (passes - (self.run.lora.rank > 0)) * gemm,      # no gradients of frozen weights
            "attention": (3.5 + (self.recompute != "none")) * attention,      # backward 2.5: five products for two (arXiv 2307.08691)
            "elementwise": passes * moved / self.memory,
            "tp": self._tensor_parallel(is_moe, again),
            "cp": self._context_parallel(attention),
            "ep": self._expert_parallel(again) if is_moe else 0.0,
        }
        launched = c.KERNELS_PER_LAYER[self.backend] * c.LAUNCH_S * passes
        parts["overhead"] = max(launched - sum(parts.values()), 0.0)
        if is_moe:      # the host waits for the router's counts in every layer, and so never runs ahead
            per_expert = c.FP8_KERNELS_PER_EXPERT if self.is_fp8 else c.KERNELS_PER_EXPERT
            parts["overhead"] += (c.KERNELS_OF_DISPATCH + per_expert * self.model.moe.num_experts // self.p.ep) * c.LAUNCH_S * passes
            if self.dispatch.is_overlapped:
                self._hide_experts_traffic(parts)
        return parts

    def _hide_experts_traffic(self, parts: dict[str, float]) -> None:
        """Beside all else that a layer does in another micro-batch, which has fewer multiprocessors meanwhile."""
        beside = sum(seconds for name, seconds in parts.items() if name != "ep")
        hidden = min(parts["ep"], beside) * c.OVERLAPPED_EP
        for name in ("gemm", "attention", "elementwise"):
            parts[name] *= 1 + (1 / (1 - c.SMS_OF_DISPATCH) - 1) * hidden / beside
        parts["ep"] -= hidden

    def _product(self, rows: int, inner: int, cols: int, peak: float) -> float:
        """Seconds of [rows, inner] @ [inner, cols]."""
        compute = 2 * rows * inner * cols / peak * (1 + c.GEMM_RAMP_K / min(inner, cols, rows))
        return max(compute, (rows * inner + inner * cols + rows * cols) * self.bytes / self.memory)

    def _products(self, is_moe: bool):
        """(how many, rows, inner, cols) of a layer's matrix products on this rank."""
        model, p, s, h = self.model, self.p, self.saved, self.model.hidden_size
        if model.is_latent:
            mla = model.mla
            made = s.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            if mla.q_lora_rank:
                yield from ((1, s.stream, h, mla.q_lora_rank), (1, s.tokens, mla.q_lora_rank, s.q))
            else:
                yield 1, s.tokens, h, s.q
            yield from ((1, s.stream, h, mla.kv_lora_rank + mla.qk_rope_head_dim), (1, s.tokens, mla.kv_lora_rank, made))
        else:
            yield 1, s.tokens, h, s.q + 2 * s.kv
        yield 1, s.tokens, s.out, h
        if not is_moe:
            yield from self._mlp(1, s.tokens, model.ffn_hidden_size // p.tp)
            return
        if model.moe.shared_expert_ffn_hidden_size:
            yield from self._mlp(1, s.tokens, model.moe.shared_expert_ffn_hidden_size // p.tp)
        local = model.moe.num_experts // p.ep
        yield from self._mlp(local, max(s.expert_rows // local, 1), model.moe_ffn_hidden_size // p.expert_tp)

    def _mlp(self, num: int, rows: int, width: int):
        h = self.model.hidden_size
        return (num, rows, h, (1 + self.model.gated) * width), (num, rows, width, h)

    def _attention(self, is_windowed: bool) -> float:
        """Forward; cp ranks have equal shares of the triangle."""
        s, model = self.saved, self.model
        seen = min(model.sliding_window, s.seq / 2) if is_windowed else s.seq / 2
        if self.backend == "torch" and s.mask(is_windowed):
            seen = s.seq      # a kernel that reads a mask computes what it hides
        share = c.ATTENTION_SHARE if self.backend == "te" else c.TORCH_ATTENTION_SHARE
        return 2 * s.tokens * seen * s.heads * (model.head_size + model.value_size) / (self.cluster.gpu.tflops * 1e12 * share)

    def _moved(self, is_moe: bool) -> float:
        """Bytes that norms, residuals, RoPE, activations and the dispatch of tokens read and write in a forward pass."""
        s, model, h = self.saved, self.model, self.model.hidden_size
        moved = 10 * s.stream * h + 3 * s.tokens * (s.q + 2 * s.kv)      # two norms (2 each), two residual sums (3 each); RoPE and layouts
        gated = 3 if model.gated else 2
        if is_moe:
            width = model.moe_ffn_hidden_size // self.p.expert_tp
            moved += s.expert_rows * (gated * width + 8 * h) + s.tokens * gated * model.moe.shared_expert_ffn_hidden_size // self.p.tp
        else:
            moved += s.tokens * gated * model.ffn_hidden_size // self.p.tp
        extra = 1.0 if self.backend == "te" else 1.5      # not fused
        return moved * self.bytes * extra

    # --- traffic ------------------------------------------------------------------------------------------------------

    def _wire(self, size: int, stride: int) -> float:
        """Bytes per second of a ring over `size` ranks that stand `stride` apart: links inside a node, else the network, where
        ranks of one node use one port each."""
        node, gpu = self.cluster.per_node, self.cluster.gpu
        if size * stride <= node or self.cluster.num_nodes == 1:
            return gpu.link_gbs * 1e9 * c.LINK_SHARE
        ports = max(node // stride, 1)
        return min(ports * self.cluster.network_gbs * c.NETWORK_SHARE, gpu.link_gbs * c.LINK_SHARE) * 1e9

    def _over_tp(self) -> float:
        """A gather or a scatter of the hidden states over tp."""
        tp = self.p.tp
        if tp == 1:
            return 0.0
        return self.saved.tokens * self.model.hidden_size * self.bytes * (tp - 1) / tp / self._wire(tp, 1) + c.LATENCY_S

    def _tensor_parallel(self, is_moe: bool, again: int) -> float:
        """Forward: two gathers and two scatters (or two all-reduces, of the same volume); backward: those and two gathers of inputs."""
        forward, backward = (4, 6) if self.p.sequence_parallel else (4, 4)
        if is_moe:
            forward, backward = (2, 3) if not self.model.moe.shared_expert_ffn_hidden_size else (forward, backward)
        exposed = forward * (1 + again) + backward * c.BACKWARD_TP
        if is_moe and self.p.expert_tp > 1:
            exposed += 4 * self.saved.expert_rows / self.saved.tokens
        if self.p.tp_comm_overlap and self.backend == "te":
            exposed *= c.OVERLAPPED_TP
        return self._over_tp() * exposed

    def _context_parallel(self, attention: float) -> float:
        """te passes keys and values round a ring beside the attention; torch gathers them before it."""
        cp, s = self.p.cp, self.saved
        if cp == 1:
            return 0.0
        volume = s.seq * s.batch * (s.kv + (s.v if not self.model.is_latent else s.q + s.v)) * self.bytes * (cp - 1) / cp
        seconds = volume / self._wire(cp, self.p.tp) + c.LATENCY_S
        if self.backend == "torch":
            return 3 * seconds      # gathered forward; gathered, and gradients scattered, backward
        return max(seconds - attention, 0.0) + max(2 * seconds - 2.5 * attention, 0.0) + 2 * c.LATENCY_S

    def _expert_parallel(self, again: int) -> float:
        """All-to-all: tokens to their experts and back, forward and backward."""
        ep, s = self.p.ep, self.saved
        if ep == 1:
            return 0.0
        moe, span, node = self.model.moe, ep * self.p.expert_tp, self.cluster.per_node
        sent = s.stream * self.model.hidden_size * self.bytes      # bytes of one copy of each token
        links, network = self.cluster.gpu.link_gbs * 1e9 * c.LINK_SHARE, self.cluster.network_gbs * 1e9 * c.NETWORK_SHARE
        inside = sent * moe.top_k * max(min(node // self.p.expert_tp, ep) - 1, 0) / ep / links
        outside = 0.0
        if span > node and self.cluster.num_nodes > 1:
            nodes, copies = span / node, moe.top_k
            if self.dispatch.once_per_node:
                copies = _nodes_of_a_token(moe, nodes)
                inside = sent * moe.top_k * (node - 1) / node / links      # from whatever node they come
            outside = sent * copies * (1 - 1 / nodes) / network
        size = 0.75 if self.dispatch.sends_fp8 else 1      # every second way is a dispatch: one byte of two
        return (4 + 2 * again) * (size * max(inside, outside) + c.LATENCY_S)

    def _between_stages(self) -> float:
        """Hidden states to the next pp rank and gradients to the one before, for every chunk."""
        p, s = self.p, self.saved
        seconds = s.stream * self.model.hidden_size * self.bytes / self._wire(p.pp, self.cluster.num_gpus // p.pp) + c.LATENCY_S
        exposed = 0.2 if p.vpp > 1 and p.overlap_p2p else 1.0
        return 2 * p.vpp * seconds * exposed

    def _gradients(self, one: float) -> float:
        """Reduction of gradients and gathering of weights, less what the last backward and the first forward pass hide."""
        p, dp = self.p, self.cluster.num_gpus // (self.p.tp * self.p.pp)
        if dp == 1:
            return 0.0
        expert_dp = self.cluster.num_gpus // (p.expert_tp * p.ep * p.pp)
        dense, expert = learning(self.run)
        gradient = 2 if self.run.optim.precision_aware else 4
        weight = 1 if self.run.train.fp8.params else self.bytes
        reduce = gather = 0.0
        for numel, size, stride in ((dense, dp, p.tp), (expert, expert_dp, p.expert_tp * p.ep)):
            if numel and size > 1:
                volume = numel * (size - 1) / size / self._wire(size, stride)
                reduce, gather = reduce + gradient * volume, gather + (weight if p.zero1 else gradient) * volume
        # Beside it runs one micro-batch; interleaved, the last pp of each chunk but the one that ends last.
        beside = one * (1 if p.vpp == 1 else p.pp * (p.vpp - 1) / p.vpp) * c.OVERLAPPED_DP
        if not p.zero1:      # an all-reduce, which is both
            reduce, gather = reduce + gather, 0.0
        if p.overlap_grad_reduce:
            reduce -= min(reduce * c.OVERLAPPED_DP, beside * 2 / 3)
        if p.overlap_param_gather:
            gather -= min(gather * c.OVERLAPPED_DP, beside / 3)
        return reduce + gather

    def _optimizer(self) -> float:
        """Zeroing and reading gradients; moments and masters read and written, weights written."""
        dense, expert = learning(self.run)
        shares = self.cluster.num_gpus // (self.p.tp * self.p.pp) if self.p.zero1 else 1
        return (12 * (dense + expert) + 30 * (dense + expert) / shares) / self.memory + 4 * c.LATENCY_S


def _nodes_of_a_token(moe, nodes: float) -> float:
    """Of so many nodes with evenly chosen experts, how many hold some of a token's: it may be limited to groups, which lie on nodes of their own."""
    reachable = nodes * moe.group_top_k / moe.num_groups if moe.num_groups > 1 else nodes
    reachable = max(reachable, 1)
    return reachable * (1 - (1 - 1 / reachable) ** moe.top_k)

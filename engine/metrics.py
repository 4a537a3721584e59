"""What a run is measured by: model FLOPs, parameter counts, MFU against the device's peak, peak memory, and sums to average once.

    flops = step_flops(run.model, run.train.seq_len, num_samples)
    rate = tflops_per_device(flops, seconds, world_size)           # TFLOP/s
    share = mfu(rate, peak_tflops(torch.cuda.get_device_name()))   # 0..1, None where the peak is unknown
    sums = Sums(); sums.add("lm loss", loss.sum, loss.count); sums.reduce(all_reduce); sums.means()

Counting is arithmetic on the configuration and needs no torch, so that a planner can use it before anything is built.
Left out: FLOPs of norms, activations, softmax, rotary embedding, router and optimizer (below a percent of a real model),
of recomputation (these are model FLOPs, not hardware FLOPs), and bandwidth models.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from engine.config import Model

# Dense TFLOP/s per GPU without sparsity: (words of the device name, bf16 and fp16 with fp32 accumulation, fp8), the more
# specific name first. From NVIDIA's data sheets, which print figures with 2:4 sparsity for most of these; halved here.
PEAK_TFLOPS = (
    ("GB300", 2500.0, 5000.0),       # GB300 NVL72 data sheet, per GPU
    ("B300", 2250.0, 4500.0),        # HGX B300 data sheet, per GPU
    ("GB200", 2500.0, 5000.0),       # GB200 NVL72 data sheet: 360 and 720 PFLOP/s with sparsity over 72 GPUs
    ("B200", 2250.0, 4500.0),        # HGX B200 data sheet: 36 and 72 PFLOP/s with sparsity over 8 GPUs
    ("H200 NVL", 835.5, 1670.5),     # H200 data sheet: 1,671 and 3,341 with sparsity
    ("H200", 989.5, 1979.0),         # H200 data sheet, SXM: 1,979 and 3,958 with sparsity
    ("GH200", 989.5, 1979.0),        # GH200 data sheet
    ("H100 NVL", 835.5, 1670.5),     # H100 data sheet
    ("H100 PCIe", 756.5, 1513.0),    # H100 PCIe product brief: 1,513 and 3,026 with sparsity
    ("H100", 989.5, 1979.0),         # H100 data sheet, SXM5
    ("H800 PCIe", 756.5, 1513.0),    # as H100 PCIe
    ("H800", 989.5, 1979.0),         # as H100 SXM5
    ("H20", 148.0, 296.0),           # H20 data sheet
    ("A100", 312.0, None),           # A100 data sheet, SXM and PCIe
    ("A800", 312.0, None),           # as A100
    ("A40", 149.7, None),            # A40 data sheet
    ("A30", 165.0, None),            # A30 data sheet
    ("A10", 125.0, None),            # A10 data sheet
    ("L40S", 362.05, 733.0),         # L40S data sheet
    ("L40", 181.05, 362.0),          # L40 data sheet
    ("L4", 121.0, 242.5),            # L4 data sheet: 242 and 485 with sparsity
    ("RTX 4090", 165.2, 330.3),      # Ada architecture white paper, fp32 accumulation
    ("RTX 3090", 71.0, None),        # Ampere GA102 architecture white paper, fp32 accumulation
)


class Parameters(NamedTuple):
    """Scalars of a model: all of them, and those that one token passes through (top_k of the experts)."""

    total: int
    active: int


def num_parameters(model: Model, seq_len: int = 0) -> Parameters:
    """Trainable scalars as the engine builds the model, rows of vocabulary padding included; the sum over tp, pp and ep ranks.

    seq_len: rows of learned positions where model.max_position is 0.
    """
    h = model.hidden_size
    embeddings = model.padded_vocab_size * h * (1 if model.tie_embeddings else 2)
    if model.position == "learned":
        embeddings += (model.max_position or seq_len) * h
    mtp = model.mtp.num_layers
    total = active = embeddings + _norm(model, h) + mtp * (2 * h * h + 3 * _norm(model, h))
    for is_moe in model.moe_layers + mtp * model.moe_layers[-1:]:
        shared = _attention(model) + (4 if model.norm_place == "both" else 2) * _norm(model, h)
        if not is_moe:
            shared += _mlp(model, model.ffn_hidden_size)
            total, active = total + shared, active + shared
            continue
        expert = _mlp(model, model.moe_ffn_hidden_size)
        shared += model.moe.num_experts * (h + model.linear_bias)      # router
        shared += _mlp(model, model.moe.shared_expert_ffn_hidden_size) if model.moe.shared_expert_ffn_hidden_size else 0
        total += shared + model.moe.num_experts * expert
        active += shared + model.moe.top_k * expert
    return Parameters(total, active)


def _norm(model: Model, width: int) -> int:
    return width if model.norm == "rmsnorm" else 2 * width


def _attention(model: Model) -> int:
    if model.is_latent:
        return _projections(model) + (model.mla.q_lora_rank + model.mla.kv_lora_rank)      # norms of the latents
    h, q, kv = model.hidden_size, model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    biases = (q + 2 * kv) * (model.qkv_bias or model.linear_bias) + h * model.linear_bias
    qk_norms = _norm(model, q) + _norm(model, kv) if model.qk_norm_width == "all" else 2 * _norm(model, model.head_size)
    return _projections(model) + biases + qk_norms * model.qk_norm + model.num_attention_heads * model.attention_sinks


def _projections(model: Model) -> int:
    """Entries of the matrices that make queries, keys, values and the output."""
    h, heads, mla = model.hidden_size, model.num_attention_heads, model.mla
    if not model.is_latent:
        return h * (2 * heads + 2 * model.kv_heads) * model.head_size
    queries = (h + heads * model.head_size) * mla.q_lora_rank if mla.q_lora_rank else h * heads * model.head_size
    latent = h * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + latent + heads * mla.v_head_dim * h


def _mlp(model: Model, width: int) -> int:
    up = 2 * width if model.gated else width
    return model.hidden_size * (up + width) + (up + model.hidden_size) * model.linear_bias


def flops_per_token(model: Model, seq_len: int, causal: bool = False) -> int:
    """FLOPs of forward and backward (3x forward) per token of a sequence of seq_len tokens, by Megatron-LM's formula.

    A product of [m, n] and [n, k] counts 2mnk. Counted: query, key, value and output projections, both attention products,
    (gated) MLPs, top_k routed and all shared experts, logits over the padded vocabulary, and the same of layers that predict further
    tokens (of a model whose mtp.loss_weight is not 0). The attention products are counted in full, as in the paper (arXiv
    2104.04473, section 5.1, without its recomputation) and in Megatron-LM until 2024;
    causal=True counts the half that the mask leaves, as `num_floating_point_operations` in newer Megatron-LM does.
    A sliding window is not subtracted in either, nor are document boundaries.
    """
    h, both = model.hidden_size, model.num_attention_heads * (model.head_size + model.value_size)
    attention = _projections(model) + both * seq_len // (2 if causal else 1)      # multiply-adds per token
    matrices = 3 if model.gated else 2
    routed = model.moe.top_k * model.moe_ffn_hidden_size + model.moe.shared_expert_ffn_hidden_size
    mtp = model.mtp.num_learning      # each a layer, a projection of [2h] to [h] and logits of its own
    layers = sum(attention + matrices * h * (routed if is_moe else model.ffn_hidden_size) for is_moe in model.moe_layers + mtp * model.moe_layers[-1:])
    return 3 * 2 * (layers + mtp * 2 * h * h + (1 + mtp) * h * model.padded_vocab_size)


def step_flops(model: Model, seq_len: int, num_samples: int, causal: bool = False) -> int:
    """FLOPs of one optimizer step over num_samples sequences, all devices together."""
    return num_samples * seq_len * flops_per_token(model, seq_len, causal)


def tflops_per_device(flops: float, seconds: float, num_devices: int) -> float:
    """Achieved TFLOP/s of each device."""
    return flops / seconds / num_devices / 1e12


def peak_tflops(device_name: str, fp8: bool = False) -> float | None:
    """Dense peak of a GPU in TFLOP/s by its name (torch.cuda.get_device_name, or short: "h100"); None where it is not known."""
    words = _words(device_name)
    for name, bf16, fp8_peak in PEAK_TFLOPS:
        if _words(name) <= words:
            return fp8_peak if fp8 else bf16
    return None


def _words(name: str) -> set[str]:
    # A10G and A10 are told apart by whole words; "A100-SXM4-80GB" is three of them.
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def mfu(achieved_tflops: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1 (PaLM, arXiv 2204.02311, appendix B); None without a peak."""
    return achieved_tflops / peak if peak else None


def peak_memory_gib() -> float:
    """Most memory held so far, in GiB: allocated by torch on this GPU, or the resident set of this process on a CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return _peak_resident_bytes() / 2**30


def _peak_resident_bytes() -> int:
    # Linux: getrusage's ru_maxrss is inherited through exec from the process that started us; VmHWM is our own.
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss      # bytes on macOS


class Sums:
    """Sums of (sum, count) pairs by name, divided once at the end: the mean over tokens, never a mean of means.

    Tensors are kept on their device, detached, so that adding never waits for a GPU.
    """

    def __init__(self):
        self._pairs = {}

    def add(self, name: str, total, count) -> None:
        """Add a sum and what it is a sum over (tokens, pairs, sequences); numbers or tensors of one element."""
        total, count = _detached(total), _detached(count)
        if name in self._pairs:
            old_total, old_count = self._pairs[name]
            total, count = old_total + total, old_count + count
        self._pairs[name] = (total, count)

    def update(self, pairs: Mapping[str, tuple]) -> None:
        """Add several: name -> (sum, count)."""
        for name, (total, count) in pairs.items():
            self.add(name, total, count)

    def reduce(self, all_reduce: Callable) -> None:
        """Sum over ranks: `all_reduce(tensor)` is called once, on a [2 * names] fp64 tensor, and changes it in place.

        Every rank must have the same names; their order of arrival does not matter.
        """
        import torch

        if not self._pairs:
            return
        names = sorted(self._pairs)
        flat = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self._device()) for name in names for x in self._pairs[name]])
        all_reduce(flat)
        for i, name in enumerate(names):
            self._pairs[name] = (flat[2 * i], flat[2 * i + 1])

    def means(self) -> dict[str, float]:
        """name -> sum / count; nan where nothing was counted."""
        return {name: float(total) / float(count) if float(count) else math.nan for name, (total, count) in self._pairs.items()}

    def _device(self):
        return next((x.device for pair in self._pairs.values() for x in pair if hasattr(x, "device")), "cpu")


def _detached(x):
    # clone: Megatron's schedules divide a returned loss in place, after it was added here.
    return x.detach().clone() if hasattr(x, "detach") else x

"""Published runs, as they were published, for benchmarks/planner.py and tests/test_planner.py.

What a source does not say (micro-batch and interleaving of Megatron-LM's table, how DeepSeek spread layers) is left to the planner, which takes the
fastest that it thinks fits, without recomputation where that fits; NVIDIA and Meta had tuned theirs. Rates are tokens per second and GPU where the source has them,
since sources count FLOPs differently; else model TFLOP/s per GPU.
"""

from dataclasses import dataclass

from engine.config import RunConfig
from engine.models import family_defaults
from engine.planner.cluster import make_cluster
from engine.planner.layouts import placed
from engine.planner.search import Plan, judge
from engine.planner.time import OURS, Dispatch
from engine.planner.weights import spread

MEGATRON = "Megatron-LM README, images/model_table.png"
LLAMA3 = "arXiv 2407.21783, table 4"
BRIDGE = "Megatron Bridge, docs/performance-summary-archive.md"
MOE = "megatron-core, megatron/core/transformer/moe/README.md"
NEMO = "NeMo 24.12 user guide, performance summary"
DEEPSEEK = "arXiv 2412.19437, table 1 and sec. 3.2"


@dataclass(frozen=True)
class Row:
    """rate and unit: as published. is_fitted: a constant of engine/planner/constants.py was fitted to it. dispatch: how tokens went to experts.
    layers: of each chunk, where the source says it."""

    name: str
    source: str
    gpus: int
    rate: float
    unit: str
    model: dict
    parallel: dict
    train: dict
    gpu: str = "h100"
    is_fitted: bool = False
    micro_batches: tuple[int, ...] = (1,)
    chunks: tuple[int, ...] = (1,)
    dispatch: Dispatch = OURS
    layers: tuple[int, ...] = ()


def _gpt(name, heads, hidden, layers, tp, pp, gpus, batch, rate, is_fitted=False) -> Row:
    model = dict(family="gpt2", num_layers=layers, hidden_size=hidden, ffn_hidden_size=4 * hidden, num_attention_heads=heads, vocab_size=131072,
                 position="rope", tie_embeddings=False, hidden_dropout=0.0, attention_dropout=0.0)
    chunks = [n for n in range(1, layers // pp + 1) if layers // pp % n == 0] if pp > 1 else [1]
    return Row(f"GPT {name}", MEGATRON, gpus, rate, "TFLOP/s", model, dict(tp=tp, pp=pp, tp_comm_overlap=tp > 1), dict(seq_len=4096, global_batch=batch),
               is_fitted=is_fitted, micro_batches=(1, 2, 4), chunks=tuple(chunks))


def _nemo(name, gpus, rate, model, parallel, batch, chunks=1, micro_batch=1, seq_len=8192) -> Row:
    """Of its FP8 rows those without tp, and those whose recipes in NVIDIA's scripts overlap its traffic."""
    parallel = {**parallel, "tp_comm_overlap": "tp" in parallel}
    return Row(name, NEMO, gpus, rate, "tokens/s", model, parallel, dict(seq_len=seq_len, global_batch=batch, fp8=_FP8), chunks=(chunks,),
               micro_batches=(micro_batch,))


def _gpt3(layers, hidden, heads) -> dict:
    return dict(family="gpt2", num_layers=layers, hidden_size=hidden, ffn_hidden_size=4 * hidden, num_attention_heads=heads, vocab_size=51200,
                hidden_dropout=0.0, attention_dropout=0.0)


_FP8 = {"recipe": "tensorwise"}
_LLAMA2 = dict(family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, vocab_size=32000)
_LLAMA2_13B = _LLAMA2 | dict(num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40)
_405B = dict(family="llama", size="llama3.1_8b", num_layers=126, hidden_size=16384, ffn_hidden_size=53248, num_attention_heads=128)
# The first chunk had the embedding alone, the last one the output (sec. 3.3.2), so each of the others was one layer. The engine wants a layer in each.
_OF_META = dict(chunks=(8,), layers=(0, *[1] * 126, 0))

ROWS = [
    _gpt("1.7B", 16, 2048, 24, 1, 1, 48, 192, 408.8, True),
    _gpt("7.1B", 32, 4096, 30, 2, 1, 96, 192, 465.9),
    _gpt("16B", 48, 6144, 32, 4, 1, 192, 192, 489.1, True),
    _gpt("32B", 56, 7168, 48, 8, 1, 384, 192, 459.6),
    _gpt("70B", 64, 8192, 84, 8, 2, 768, 384, 419.7),
    _gpt("119B", 80, 10240, 92, 8, 4, 1536, 768, 420.5),
    _gpt("177B", 96, 12288, 96, 8, 6, 2304, 1152, 432.8, True),
    _gpt("314B", 128, 16384, 96, 8, 8, 3072, 1536, 474.4),
    _gpt("462B", 144, 18432, 112, 8, 16, 6144, 3072, 459.9),
    Row("Llama 3 405B", LLAMA3, 8192, 430, "TFLOP/s", _405B, dict(tp=8, pp=16), dict(seq_len=8192, global_batch=2048), **_OF_META),
    Row("Llama 3 405B", LLAMA3, 16384, 400, "TFLOP/s", _405B, dict(tp=8, pp=16), dict(seq_len=8192, global_batch=2048), **_OF_META),
    Row("Llama 3 405B 128K", LLAMA3, 16384, 380, "TFLOP/s", _405B, dict(tp=8, pp=16, cp=16), dict(seq_len=131072, global_batch=128), **_OF_META),
    Row("Llama 3 70B FP8", BRIDGE, 64, 1621, "tokens/s", dict(family="llama", size="llama3_70b"), dict(tp=4, pp=8, tp_comm_overlap=True),
        dict(seq_len=8192, global_batch=256, fp8=_FP8), is_fitted=True, chunks=(5,)),
    Row("Llama 3.1 405B FP8", BRIDGE, 1024, 311, "tokens/s", _405B, dict(tp=8, pp=8, cp=2, tp_comm_overlap=True),
        dict(seq_len=8192, global_batch=1536, fp8=_FP8), chunks=(8,)),
    # Added after all constants had their values.
    _nemo("GPT-3 5B FP8", 64, 23406, _gpt3(24, 4096, 32), {}, 2048, micro_batch=4, seq_len=2048),
    _nemo("GPT-3 175B FP8", 128, 716, _gpt3(96, 12288, 96), dict(tp=4, pp=8), 256, 6, seq_len=2048),
    _nemo("GPT-3 175B FP8", 512, 825, _gpt3(96, 12288, 96), dict(tp=4, pp=8), 2048, 6, micro_batch=2, seq_len=2048),
    _nemo("Llama 2 7B FP8", 8, 16934, _LLAMA2, {}, 128, seq_len=4096),
    _nemo("Llama 2 13B FP8", 16, 8715, _LLAMA2_13B, dict(pp=4), 128, 10, seq_len=4096),
    _nemo("Llama 3 8B FP8", 8, 12273, dict(family="llama", size="llama3_8b"), dict(cp=2), 128),
    _nemo("Llama 3 70B FP8", 64, 1524, dict(family="llama", size="llama3_70b"), dict(tp=4, pp=4, cp=2), 128, 5),
    Row("Mixtral 8x7B", MOE, 64, 468, "TFLOP/s", dict(family="mixtral", size="8x7b"), dict(pp=4, ep=8), dict(seq_len=4096, global_batch=256), chunks=(8,)),
    Row("Qwen3 30B-A3B FP8", BRIDGE, 16, 5113, "tokens/s", dict(family="qwen3_moe", size="30b_a3b"), dict(pp=2, ep=8),
        dict(seq_len=4096, global_batch=1024, fp8=_FP8), is_fitted=True, chunks=(12,)),
    Row("gpt-oss 120B", BRIDGE, 64, 5993, "tokens/s", dict(family="gpt_oss", size="120b"), dict(pp=4, ep=8), dict(seq_len=4096, global_batch=1280)),
    Row("Qwen3 235B-A22B FP8", BRIDGE, 256, 1633, "tokens/s", dict(family="qwen3_moe", size="235b_a22b"), dict(tp=2, pp=8, ep=32, etp=1),
        # moe_a2a_overlap with the alltoall dispatcher: scripts/performance/configs/qwen
        dict(seq_len=4096, global_batch=8192, fp8=_FP8), chunks=(4,), dispatch=Dispatch(is_overlapped=True)),
    # DeepEP, a2a_1f1b and the layout Et|(tt|)*30mL: scripts/performance/configs/deepseek, for H100 without token drop. Later releases do not overlap.
    Row("DeepSeek-V3 FP8", BRIDGE, 1024, 1297, "tokens/s", dict(family="deepseek_v3", size="671b"),
        dict(tp=2, pp=8, ep=64, etp=1), dict(seq_len=4096, global_batch=8192, fp8=_FP8), chunks=(4,),
        dispatch=Dispatch(once_per_node=True, is_overlapped=True), layers=(1, *[2] * 30, 0)),
    # 2.664 million H800 hours for 14.8T tokens of pretraining
    Row("DeepSeek-V3 FP8", DEEPSEEK, 2048, 14.8e12 / (2.664e6 * 3600), "tokens/s", dict(family="deepseek_v3", size="671b"), dict(pp=16, ep=64),
        dict(seq_len=4096, global_batch=15360, fp8=_FP8), gpu="h800",
        dispatch=Dispatch(once_per_node=True, sends_fp8=True, is_overlapped=True, is_dualpipe=True)),
]


def run_of(row: Row, micro_batch: int, vpp: int, recompute: str, is_lean: bool = False) -> RunConfig:
    """Without the engine's checks, which would ask for data. is_lean: gradients and moments in bf16 and FP8 parameters, as NVIDIA's recipes have them."""
    family, size = row.model["family"], row.model.get("size", "custom")
    parallel = {"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "sequence_parallel": row.parallel.get("tp", 1) > 1}
    model = {**family_defaults(family, size), **row.model}
    run = RunConfig.model_validate({
        "run": {"dir": "unused"}, "model": model, "parallel": {**parallel, **row.parallel, "vpp": vpp},
        "train": {"steps": 1, **row.train, "micro_batch": micro_batch, "recompute": recompute, "fp8": {**row.train.get("fp8", {}), "params": is_lean and "fp8" in row.train}},
        "optim": {"precision_aware": is_lean}})
    return placed(run, pp_layers=list(row.layers) or spread(run.model.num_layers, run.parallel.pp * vpp, run.model.mtp.num_learning))


def planned(row: Row) -> Plan:
    """The fastest of the row's open choices that fits without recomputation; of those that do not, the fastest."""
    cluster = make_cluster(row.gpu, row.gpus)
    plans = [judge(run_of(row, micro_batch, vpp, "none"), cluster, "te", row.dispatch) for micro_batch in row.micro_batches for vpp in row.chunks]
    return min([plan for plan in plans if plan.fits] or plans, key=lambda plan: plan.time.total)


def least_recomputation(row: Row, is_lean: bool = False) -> str:
    """none, selective or full: what lets some of the row's open choices fit into the engine's memory, or never."""
    cluster = make_cluster(row.gpu, row.gpus)
    for recompute in ("none", "selective", "full"):
        if any(judge(run_of(row, micro_batch, vpp, recompute, is_lean), cluster, "te").fits for micro_batch in row.micro_batches for vpp in row.chunks):
            return recompute
    return "never"

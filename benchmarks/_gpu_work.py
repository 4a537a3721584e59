"""The contestants of gpu_table.py: each is measured in a process of its own, python benchmarks/_gpu_work.py NAME JSON, which prints one JSON object.

A contestant is a function of sizes that returns (step, flops): step(i) does the i-th piece of work, flops is what one amounts to by Megatron's formula
(0 where that says nothing). Measured: seconds of each step with the device waited for, and peak memory above what lay there before the first.
A library that is missing is an answer: {"missing": why}. device "cpu" runs the same code at any size, to show that it runs.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
LR = 1e-4
BF16 = "bf16"


def text(sizes: dict, i: int, device: str = ""):
    """Tokens [batch, seq + 1] of step i, on the device (or another)."""
    import torch

    generator = torch.Generator().manual_seed(i)
    return torch.randint(0, sizes["vocab"], (sizes["batch"], sizes["seq"] + 1), generator=generator).to(device or sizes["device"])


def batches(sizes: dict, i: int, device: str = "") -> list:
    """The tokens of each micro-batch of step i."""
    num = sizes.get("micro_batches", 1)
    return [text(sizes, i * num + j, device) for j in range(num)]


def run_of(sizes: dict, **sections):
    """A RunConfig of these sizes."""
    from engine.config import validate

    model = {"family": "llama", "num_layers": sizes["layers"], "hidden_size": sizes["hidden"], "ffn_hidden_size": sizes["ffn"],
             "num_attention_heads": sizes["heads"], "num_query_groups": sizes.get("groups", 0), "vocab_size": sizes["vocab"],
             "tie_embeddings": sizes.get("tied", False), "activation": "swiglu" if sizes.get("gated", True) else "gelu", **sizes.get("model", {})}
    raw = {"run": {"dir": "unused", "device": sizes["device"]}, "model": model, "data": {"train": ["unused"]},
           "train": {"seq_len": sizes["seq"], "micro_batch": sizes["batch"], "global_batch": samples(sizes), "steps": 1, "precision": BF16},
           "parallel": {"zero1": True}}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return validate(raw)


def samples(sizes: dict) -> int:
    """Of one step."""
    return sizes["batch"] * sizes.get("micro_batches", 1)


def network(run, role=None):
    from engine.mcore import topology

    place = topology.start(run)
    from engine.mcore.run import ParallelModel
    from engine.stage import Role
    from engine.stages import build_stage

    return ParallelModel(run, place, build_stage("pretrain"), "policy", role or Role())


# --- a training step ----------------------------------------------------------------------------------------------------


def ours(sizes: dict, **sections):
    """Trireme: train.backend=auto takes Transformer Engine where it is."""
    import torch

    from engine import metrics

    run = run_of(sizes, **sections)
    model = network(run)

    loss_mask, positions = torch.ones(sizes["batch"], sizes["seq"]), torch.arange(sizes["seq"]).expand(sizes["batch"], -1)

    def step(i):
        model.forward_backward([dict(tokens=tokens[:, :-1], labels=tokens[:, 1:], loss_mask=loss_mask, position_ids=positions)
                                for tokens in batches(sizes, i, "cpu")])  # as a loader hands them over: what is asked of a batch is asked on the host
        model.step(LR)

    return step, metrics.step_flops(run.model, sizes["seq"], samples(sizes))


def megatron(sizes: dict, fp8: str = ""):
    """megatron-core as Megatron-LM sets it up: its own layer spec (Transformer Engine's on a GPU), DDP, distributed optimizer, fused loss. Where
    Megatron-LM has apex the output layer's weight gradient is added in its product too; here it is added afterwards, as ours is. fp8: a recipe of TE."""
    import engine.mcore  # noqa: F401 (prepares megatron's import on a machine without a GPU)
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import layers, model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from engine import metrics

    on_gpu = sizes["device"] == "cuda"
    if (on_gpu or fp8) and engine.mcore.te_problem:
        raise ImportError(engine.mcore.te_problem)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    gated = sizes.get("gated", True)
    config = TransformerConfig(
        num_layers=sizes["layers"], hidden_size=sizes["hidden"], ffn_hidden_size=sizes["ffn"], num_attention_heads=sizes["heads"],
        num_query_groups=sizes.get("groups") or sizes["heads"], normalization="RMSNorm", gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16, bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu and gated, apply_rope_fusion=on_gpu, masked_softmax_fusion=False, persist_layer_norm=on_gpu,
        gradient_accumulation_fusion=on_gpu, cross_entropy_loss_fusion=on_gpu, cross_entropy_fusion_impl="te" if on_gpu else "native",
        **(dict(fp8="hybrid", fp8_recipe=fp8) if fp8 else {}))
    spec = get_gpt_layer_with_transformer_engine_spec() if on_gpu else get_gpt_layer_local_spec(normalization="RMSNorm")
    layers._grad_accum_fusion_available = on_gpu  # the output layer would ask for apex when it is built; see spec_te.py
    bare = GPTModel(config, spec, sizes["vocab"], sizes["seq"], position_embedding_type="rope", share_embeddings_and_output_weights=False)
    bare.output_layer.gradient_accumulation_fusion = False
    bare = bare.to(sizes["device"])
    from megatron.core.transformer.module import Float16Module

    sharded = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, sharded, Float16Module(config, bare))
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=LR, weight_decay=0.1, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16,
                                                       use_distributed_optimizer=True), [model], use_gloo_process_groups=False)
    positions = torch.arange(sizes["seq"], device=sizes["device"]).expand(sizes["batch"], -1)
    mask = None if on_gpu else torch.ones(1, 1, sizes["seq"], sizes["seq"], dtype=torch.bool).triu(1)

    def forward(iterator, model):
        tokens = next(iterator)
        losses = model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous())
        return losses, lambda out: (out.float().mean(), {"loss": out.detach().mean()})

    def step(i):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(forward_step_func=forward, data_iterator=iter(batches(sizes, i)), model=model, seq_length=sizes["seq"],
                                    num_microbatches=sizes.get("micro_batches", 1), micro_batch_size=sizes["batch"], forward_only=False)
        optimizer.step()

    return step, metrics.step_flops(run_of(sizes).model, sizes["seq"], samples(sizes))


def torchtitan(sizes: dict, **options):
    """torchtitan's Trainer (_gpu_titan.py). On a CPU uncompiled, with SDPA (FlexAttention has no backward pass there) and moments in fp32."""
    from _gpu_titan import batch_of, trainer_of

    from engine import metrics

    on_cpu = {"attention": "sdpa", "compile": False, "low_moments": False} if sizes["device"] == "cpu" else {}
    trainer = trainer_of(sizes, lr=LR, **{**options, **on_cpu})

    def step(i):
        trainer.step = i + 2  # it logs the first
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(iter([batch_of(tokens) for tokens in batches(sizes, i, "cpu")]))

    return step, metrics.step_flops(run_of(sizes).model, sizes["seq"], samples(sizes))


def torchao_llama(sizes: dict):
    """A Llama in plain torch whose blocks are compiled and take FP8 products by torchao's Float8Linear with one scale per tensor, as our first
    recipe does; torchtitan's converter has one per row alone. bf16 weights with torch's fused AdamW, attention by SDPA."""
    import torch
    import torch.nn.functional as F
    from torchao.float8 import convert_to_float8_training

    from engine import metrics

    hidden, heads, groups = sizes["hidden"], sizes["heads"], sizes.get("groups") or sizes["heads"]
    size = hidden // heads

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            linear = lambda a, b: torch.nn.Linear(a, b, bias=False)  # noqa: E731
            self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden, eps=1e-5) for _ in range(2))
            self.qkv, self.out = linear(hidden, (heads + 2 * groups) * size), linear(heads * size, hidden)
            self.gate_up, self.down = linear(hidden, 2 * sizes["ffn"]), linear(sizes["ffn"], hidden)

        def forward(self, x, turns):
            b, s, _ = x.shape
            q, k, v = self.qkv(self.norms[0](x)).split([heads * size, groups * size, groups * size], -1)
            q, k, v = (t.view(b, s, -1, size).transpose(1, 2) for t in (q, k, v))
            q, k = (t * turns[0] + torch.cat([-t[..., size // 2:], t[..., :size // 2]], -1) * turns[1] for t in (q, k))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(b, s, -1))
            gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(sizes["vocab"], hidden), torch.nn.Linear(hidden, sizes["vocab"], bias=False)
            self.blocks, self.norm = torch.nn.ModuleList(Block() for _ in range(sizes["layers"])), torch.nn.RMSNorm(hidden, eps=1e-5)

        def forward(self, tokens, turns):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, turns)
            return self.head(self.norm(x))

    with torch.device(sizes["device"]):
        model = Network().bfloat16()
        if sizes.get("tied"):
            model.head.weight = model.embedding.weight
        angles = torch.outer(torch.arange(sizes["seq"]).float(), 10000.0 ** (-torch.arange(0, size, 2).float() / size)).repeat(1, 2)
        turns = angles.cos().bfloat16(), angles.sin().bfloat16()
    convert_to_float8_training(model.blocks)
    on_gpu = sizes["device"] == "cuda"
    if on_gpu:
        for block in model.blocks:
            block.compile()
    loss_of = torch.compile(F.cross_entropy) if on_gpu else F.cross_entropy
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(i):
        for tokens in batches(sizes, i):
            loss = loss_of(model(tokens[:, :-1], turns).flatten(0, 1).float(), tokens[:, 1:].flatten())
            (loss / sizes.get("micro_batches", 1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, metrics.step_flops(run_of(sizes).model, sizes["seq"], samples(sizes))


# --- parts --------------------------------------------------------------------------------------------------------------


def gemm(sizes: dict, fp8: bool = False):
    """The best that the machine does: one square product after another."""
    import torch

    n = sizes["hidden"]
    a, b = (torch.randn(n, n, device=sizes["device"]).bfloat16() for _ in range(2))
    if fp8:
        one = torch.ones((), device=sizes["device"])
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        return lambda i: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True), 2 * n**3
    return lambda i: a @ b, 2 * n**3


def _loss_inputs(sizes: dict):
    import torch

    tokens = sizes["batch"] * sizes["seq"]
    hidden = torch.randn(tokens, sizes["hidden"], device=sizes["device"]).bfloat16().requires_grad_()
    weight = (torch.randn(sizes["vocab"], sizes["hidden"], device=sizes["device"]) / 100).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(0, sizes["vocab"], (tokens,), device=sizes["device"])


def our_loss(sizes: dict):
    """engine/mcore/linear_ce.py, told of a loss mask beforehand as pretraining and SFT do."""
    import engine.mcore  # noqa: F401
    import torch

    from engine.mcore.linear_ce import linear_cross_entropy

    hidden, weight, labels = _loss_inputs(sizes)
    mask = torch.ones(len(hidden), device=sizes["device"])

    def step(i):
        (linear_cross_entropy(hidden, weight, labels, sizes["vocab"], proportions=mask) * mask).sum().backward()
        hidden.grad = weight.grad = None

    return step, 6 * hidden.size(0) * hidden.size(1) * sizes["vocab"]


def plain_loss(sizes: dict):
    """F.linear, then F.cross_entropy of the logits in fp32."""
    import torch.nn.functional as F

    hidden, weight, labels = _loss_inputs(sizes)

    def step(i):
        F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum").backward()
        hidden.grad = weight.grad = None

    return step, 6 * hidden.size(0) * hidden.size(1) * sizes["vocab"]


def torchs_loss(sizes: dict):
    """F.linear_cross_entropy in chunks, which makes gradients in the forward pass too."""
    import torch
    import torch.nn.functional as F

    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    hidden, weight, labels = _loss_inputs(sizes)
    options = torch.nn.LinearCrossEntropyOptions()

    def step(i):
        F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options).backward()
        hidden.grad = weight.grad = None

    return step, 6 * hidden.size(0) * hidden.size(1) * sizes["vocab"]


def our_moe(sizes: dict):
    """The engine's mixture layer of a one-layer network: router, permutation, experts, forward and backward."""
    import torch

    from engine.mcore import build

    moe = {"num_experts": sizes["experts"], "top_k": sizes["top_k"], "ffn_hidden_size": sizes["ffn"], "balance": "none"}
    layer = build.bare(network(run_of({**sizes, "layers": 1, "model": {"moe": moe}})).chunks[0]).decoder.layers[0].mlp
    return _both_ways(lambda x: layer(x)[0], sizes, torch), _moe_flops(sizes)


def _both_ways(forward, sizes: dict, torch):
    x = torch.randn(sizes["seq"], sizes["batch"], sizes["hidden"], device=sizes["device"]).bfloat16().requires_grad_()

    def step(i):
        forward(x).float().square().mean().backward()
        x.grad = None

    return step


def _moe_flops(sizes: dict) -> int:
    return 3 * 2 * 3 * sizes["batch"] * sizes["seq"] * sizes["top_k"] * sizes["hidden"] * sizes["ffn"]


def dense_mlp(sizes: dict):
    """A SwiGLU MLP as wide as top_k experts together."""
    import torch
    import torch.nn.functional as F

    width = sizes["ffn"] * sizes["top_k"]
    shapes = (sizes["hidden"], 2 * width), (width, sizes["hidden"])
    gate_up, down = (torch.nn.Linear(*shape, bias=False, device=sizes["device"]).bfloat16() for shape in shapes)

    def forward(x):
        gate, up = gate_up(x).chunk(2, -1)
        return down(F.silu(gate) * up)

    return _both_ways(forward, sizes, torch), _moe_flops(sizes)


def torch_moe(sizes: dict, grouped: bool):
    """A mixture in plain torch: tokens sorted by expert, then a loop over the experts, or torch's grouped product."""
    import torch
    import torch.nn.functional as F

    if grouped and not hasattr(torch, "_grouped_mm"):
        raise ImportError("this torch has no _grouped_mm")
    n, hidden, ffn, top_k, device = sizes["experts"], sizes["hidden"], sizes["ffn"], sizes["top_k"], sizes["device"]
    router = torch.nn.Linear(hidden, n, bias=False, device=device).bfloat16()
    w1, w2 = (torch.nn.Parameter(torch.randn(*shape, device=device).bfloat16() / 50) for shape in ((n, hidden, 2 * ffn), (n, ffn, hidden)))

    def forward(x):
        flat = x.reshape(-1, hidden)
        scores, chosen = router(flat).float().softmax(-1).topk(top_k)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=n)
        rows = flat[order // top_k]
        if grouped:
            ends = counts.cumsum(0).int()
            gate, up = torch._grouped_mm(rows, w1, offs=ends).chunk(2, -1)
            out = torch._grouped_mm(F.silu(gate) * up, w2, offs=ends)
        else:
            parts = []
            for expert, part in enumerate(rows.split(counts.tolist())):
                gate, up = (part @ w1[expert]).chunk(2, -1)
                parts.append((F.silu(gate) * up) @ w2[expert])
            out = torch.cat(parts)
        weighed = out * scores.flatten()[order].unsqueeze(1).bfloat16()
        return torch.zeros_like(flat).index_add(0, order // top_k, weighed).view_as(x)

    return _both_ways(forward, sizes, torch), _moe_flops(sizes)


# --- generation, and the loader -------------------------------------------------------------------------------------------


def our_generation(sizes: dict):
    from engine.sampling import Sampling
    from engine.stage import Role

    model = network(run_of(sizes), Role(train=False))
    sampling = Sampling(sizes["seq"] - sizes["prompt"], temperature=0.0)
    return lambda i: model.generate(text({**sizes, "seq": sizes["prompt"] - 1}, i).tolist(), sampling), 0


def hf_generation(sizes: dict):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.hf import llama

    with torch.device(sizes["device"]):
        model = LlamaForCausalLM(LlamaConfig(**llama.hf_config(run_of(sizes).model, sizes["seq"]))).bfloat16().eval()
    model.generation_config.eos_token_id = None

    def step(i):
        asked = text({**sizes, "seq": sizes["prompt"] - 1}, i)
        model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=sizes["seq"] - sizes["prompt"], do_sample=False, pad_token_id=0)

    return step, 0


CONTESTANTS = {function.__name__: function for function in (
    ours, megatron, torchtitan, torchao_llama, gemm, our_loss, plain_loss, torchs_loss, our_moe, dense_mlp, torch_moe, our_generation, hf_generation)}


def measure(name: str, sizes: dict, warm_up: int, steps: int, **options) -> dict:
    """{"seconds": of each step, "flops": of one, "peak_gib": above what lay there before}."""
    import torch

    on_gpu = sizes["device"] == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    if not on_gpu:
        torch.set_num_threads(2)
    torch.manual_seed(0)
    step, flops = CONTESTANTS[name](sizes, **options)
    for i in range(warm_up):
        step(i)
    wait()
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for i in range(steps):
        started = time.perf_counter()
        step(warm_up + i)
        wait()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"seconds": seconds, "flops": flops, "peak_gib": peak / 2**30, "above_gib": (peak - before) / 2**30 if on_gpu else 0}


if __name__ == "__main__":
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = measure(sys.argv[1], **json.loads(sys.argv[2]))
    except (ImportError, ValueError) as error:  # a library that is not there, or what the engine says of it
        cure = "; benchmarks/peers.txt names what to install" if isinstance(error, ModuleNotFoundError) else ""
        answer = {"missing": str(error) + cure}
    except Exception as error:  # one contestant's fault is a cell of the table, not the end of it
        import traceback

        traceback.print_exc()
        answer = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(answer))

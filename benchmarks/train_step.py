"""One training step on a CPU, side by side with peers in the same run: tokens per second and the ratio to ours.

    python benchmarks/train_step.py [--rounds 7] [--only ours,hf] [--threads 2]

A Llama of 10.5 million parameters (h256 L8 a8 ffn688 vocabulary 8192), sequences of 512, 8 per step: forward, backward, clipping at 1, AdamW.
Every contestant lives in a process of its own that stays up; they take turns, one step each, so that a slow minute of the
machine is everybody's. The median over the rounds counts. litgpt takes part where it is installed.
"""

import argparse
import statistics
import sys

import _turns

SIZES = dict(hidden=256, layers=8, heads=8, ffn=688, vocab=8192, seq=512, batch=8)
LR = 3e-4


def tokens(step: int):
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, SIZES["vocab"], (SIZES["batch"], SIZES["seq"] + 1), generator=generator)


def ours(precision: str = "fp32", compile: bool = False):
    """Trireme's torch backend."""
    from engine.config import validate
    from engine.mcore import topology

    run = validate({
        "run": {"dir": "unused", "device": "cpu"},
        "model": {"family": "llama", "num_layers": SIZES["layers"], "hidden_size": SIZES["hidden"], "ffn_hidden_size": SIZES["ffn"],
                  "num_attention_heads": SIZES["heads"], "vocab_size": SIZES["vocab"]},
        "data": {"train": ["unused"]},
        "train": {"seq_len": SIZES["seq"], "micro_batch": SIZES["batch"], "global_batch": SIZES["batch"], "steps": 1,
                  "precision": precision, "compile": compile},
    })
    place = topology.start(run)
    from engine.mcore.run import ParallelModel
    from engine.stages import build_stage

    model = ParallelModel(run, place, build_stage("pretrain"), "policy")

    def step(i):
        import torch

        text = tokens(i)
        batch = dict(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(text[:, 1:].shape),
                     position_ids=torch.arange(SIZES["seq"]).expand_as(text[:, 1:]))
        loss = model.forward_backward([batch]).loss
        model.step(LR)
        return loss

    return step


def megatron():
    """megatron-core as it comes: its local layer spec, its DDP, optimizer and schedule, on the same CPU device file."""
    from engine.mcore import cpu

    cpu.install()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=SIZES["layers"], hidden_size=SIZES["hidden"], ffn_hidden_size=SIZES["ffn"], num_attention_heads=SIZES["heads"],
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, gradient_accumulation_fusion=False)
    bare = GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), SIZES["vocab"], SIZES["seq"], position_embedding_type="rope")
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), bare)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=LR, weight_decay=0.1, clip_grad=1.0), [model], use_gloo_process_groups=False)
    positions = torch.arange(SIZES["seq"]).expand(SIZES["batch"], -1)
    mask = torch.ones(1, 1, SIZES["seq"], SIZES["seq"], dtype=torch.bool).triu(1)

    def forward(iterator, model):
        text = next(iterator)
        losses = model(text[:, :-1].contiguous(), positions, mask, labels=text[:, 1:].contiguous())
        return losses, lambda out: (out.mean(), {"loss": out.detach().mean()})

    def step(i):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        out = get_forward_backward_func()(forward_step_func=forward, data_iterator=iter([tokens(i)]), model=model, num_microbatches=1,
                                          seq_length=SIZES["seq"], micro_batch_size=SIZES["batch"], forward_only=False)
        optimizer.step()
        return float(out[0]["loss"])

    return step


def hf(compile: bool = False):
    """transformers' LlamaForCausalLM with torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=SIZES["vocab"], hidden_size=SIZES["hidden"], intermediate_size=SIZES["ffn"], num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"], max_position_embeddings=SIZES["seq"], use_cache=False, attn_implementation="sdpa"))
    return _torch_step(model, torch.compile(model) if compile else model, lambda m, text: m(text[:, :-1]).logits)


def litgpt():
    """litgpt's GPT."""
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(Config(block_size=SIZES["seq"], vocab_size=SIZES["vocab"], padded_vocab_size=SIZES["vocab"], n_layer=SIZES["layers"],
                       n_head=SIZES["heads"], n_embd=SIZES["hidden"], rotary_percentage=1.0, parallel_residual=False, bias=False,
                       norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=SIZES["ffn"]))
    return _torch_step(model, model, lambda m, text: m(text[:, :-1]))


def _torch_step(model, callable_model, logits):
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(i):
        text = tokens(i)
        out = logits(callable_model, text)
        loss = torch.nn.functional.cross_entropy(out.reshape(-1, out.size(-1)).float(), text[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


CONTESTANTS = {
    "ours": (ours, {}),
    "ours-compiled": (ours, {"compile": True}),
    "ours-bf16": (ours, {"precision": "bf16"}),
    "megatron-local": (megatron, {}),
    "hf": (hf, {}),
    "hf-compiled": (hf, {"compile": True}),
    "litgpt": (litgpt, {}),
}


def main() -> int:
    arguments = _turns.add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), CONTESTANTS, rounds=7).parse_args()
    contestants = _turns.chosen(CONTESTANTS, arguments.only)
    turns = _turns.take_turns(contestants, arguments, lambda losses: f"loss {losses[-1]:.3f} after {len(losses)} steps")
    report({name: own.seconds for name, own in turns.items()})
    return 0


def report(seconds: dict[str, list[float]]) -> None:
    per_step = SIZES["seq"] * SIZES["batch"]
    speed = {name: per_step / statistics.median(values) for name, values in seconds.items()}
    columns = [name for name in ("ours", "ours-compiled", "ours-bf16") if name in speed]
    print("\n| contestant | tokens/s | " + " | ".join(f"{name} / it" for name in columns) + " |")
    print("| --- | --- |" + " --- |" * len(columns))
    for name, value in speed.items():
        print(f"| {name} | {value:,.0f} | " + " | ".join(f"{speed[c] / value:.2f}" for c in columns) + " |")


if __name__ == "__main__":
    sys.exit(main())

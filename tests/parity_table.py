"""Every layout against one rank: losses, gradient norms and updated weights over several steps, dense and MoE.

    python tests/parity_table.py [--write docs/parity.md] [--only WORDS]

One run on one rank is the reference; each layout trains the same samples from the same weights (which do not depend on the
layout) with gradient accumulation, document masks and a ragged loss mask. tests/test_parity.py asserts the rows.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from engine.stage import Loss, Stage  # noqa: E402

LIMIT = 1e-5  # relative, on every column
STEPS, SEQ, BATCH, VOCAB, EOD = 5, 64, 8, 251, 7
DENSE = dict(family="llama", num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4,
             vocab_size=VOCAB, qk_norm=True)
MOE = {**DENSE, "family": "mixtral", "moe": dict(num_experts=4, top_k=2, balance="aux_loss", aux_loss_coeff=0.01, z_loss_coeff=1e-3,
                                                shared_expert_ffn_hidden_size=32)}
GPT2 = dict(family="gpt2", num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=VOCAB, max_position=SEQ)
LATENT = dict(family="deepseek_v3", num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=VOCAB,
              mla=dict(q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=12))
LATENT_MOE = dict(num_experts=8, top_k=3, ffn_hidden_size=48, shared_expert_ffn_hidden_size=32, first_dense_layers=1, num_groups=4, group_top_k=2,
                  scaling_factor=2.5)
GEMMA = dict(family="gemma3", num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4, vocab_size=VOCAB,
             sliding_window=24, sliding_window_freq=2, rope_local_theta=100.0, query_pre_attn_scalar=5, attention_softcap=2.0, logits_softcap=3.0,
             init_std=0.2)  # what is normalised behind a sublayer is then not so small that its rounding becomes large
GPT_OSS = dict(family="gpt_oss", num_layers=4, hidden_size=64, ffn_hidden_size=48, num_attention_heads=8, num_query_groups=4, head_dim=8,
               vocab_size=VOCAB, sliding_window=24, swiglu_limit=0.5, rope_scaling=dict(kind="none"),
               moe=dict(num_experts=4, top_k=2, balance="aux_loss"))
MODELS = {
    "dense": DENSE,
    "deep": {**DENSE, "num_layers": 7},
    "tied": {**DENSE, "tie_embeddings": True, "qkv_bias": True},
    "window": {**DENSE, "sliding_window": 24, "sliding_window_freq": 2},
    "post": {**DENSE, "norm_place": "post", "qk_norm_width": "all"},
    "gpt2": GPT2,
    "moe": MOE,
    "moe-seq": {**MOE, "moe": {**MOE["moe"], "balance": "seq_aux_loss"}},
    "moe-global": {**MOE, "moe": {**MOE["moe"], "balance": "global_aux_loss"}},
    "moe-bias": {**MOE, "moe": {**MOE["moe"], "balance": "aux_free", "score": "sigmoid"}},
    "gemma": GEMMA,
    "moe-sinks": GPT_OSS,
    "latent": LATENT,
    "latent-moe": {**LATENT, "moe": LATENT_MOE},
    "latent-moe-mtp": {**LATENT, "moe": LATENT_MOE, "mtp": dict(num_layers=2)},
    "tied-mtp": {**DENSE, "tie_embeddings": True, "mtp": dict(num_layers=1, loss_weight=1.0)},
    "moe-both": {**MOE, "norm_place": "both", "moe": {**MOE["moe"], "dense_layers": [2]}},
    "moe-mixed": {**MOE, "moe": {**MOE["moe"], "first_dense_layers": 1, "ffn_hidden_size": 48}},
}


@dataclass(frozen=True)
class Case:
    """One row: a model, a layout and what else differs from the plain run."""

    model: str
    ranks: int
    layout: dict
    train: dict

    def __str__(self) -> str:
        layout = " ".join(f"{k}={v}" if v is not True else k for k, v in self.layout.items()) or "dp"
        extra = " ".join(f"{k}={v}" for k, v in self.train.items())
        return f"{self.model} {self.ranks} ranks {layout} {extra}".strip()


def case(model: str, ranks: int, micro_batch: int = 1, recompute: str = "none", **layout) -> Case:
    train = {k: v for k, v in (("micro_batch", micro_batch), ("recompute", recompute)) if v not in (1, "none")}
    return Case(model, ranks, layout, train)


SP = dict(sequence_parallel=True)
CASES = [
    case("dense", 1, recompute="full"),
    case("dense", 1, micro_batch=2),
    case("dense", 1, recompute="selective"),
    case("dense", 2),
    case("dense", 2, zero1=True),
    case("dense", 2, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
    case("dense", 2, tp=2),
    case("dense", 2, tp=2, **SP),
    case("dense", 2, pp=2),
    case("dense", 2, pp=2, vpp=2),
    case("deep", 2, pp=2, pp_layers=[4, 3]),
    case("deep", 2, pp=2, vpp=2, pp_layers=[1, 2, 3, 1]),
    case("dense", 2, cp=2),
    case("dense", 2, micro_batch=2, pp=2),
    case("tied", 2, tp=2, **SP),
    case("tied", 2, pp=2),
    case("window", 2, cp=2),
    case("post", 2, tp=2, **SP, recompute="full"),
    case("post", 2, tp=2, zero1=True),
    case("gpt2", 2, tp=2, **SP),
    case("gpt2", 2, pp=2),
    case("gpt2", 2, cp=2),
    case("dense", 4, tp=2, **SP, pp=2),
    case("post", 4, tp=2, **SP, pp=2, vpp=2, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
    case("dense", 4, tp=2, **SP, cp=2),
    case("dense", 4, tp=4, **SP),
    case("dense", 4, pp=4),
    case("dense", 4, pp=2, vpp=2, zero1=True),
    case("dense", 4, pp=2, vpp=2, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
    case("dense", 4, cp=2, zero1=True),
    case("dense", 4, cp=4),
    case("tied", 4, tp=2, pp=2, zero1=True),
    case("dense", 4, tp=2, **SP, pp=2, recompute="full"),
    case("moe", 2),
    case("moe", 2, zero1=True),
    case("moe", 2, ep=2),
    case("moe", 2, tp=2, **SP),
    case("moe", 2, tp=2, **SP, etp=1),
    case("moe", 2, tp=2, **SP, etp=1, ep=2),
    case("moe", 2, pp=2),
    case("moe", 2, cp=2),
    case("moe", 2, cp=2, ep=2),
    case("moe-seq", 2, tp=2, **SP),
    case("moe-global", 2, tp=2, **SP),
    case("moe-global", 2, cp=2),
    case("moe-global", 2, pp=2),
    case("moe-bias", 2, ep=2),
    case("moe-bias", 2, cp=2),
    case("moe-mixed", 2, pp=2),
    case("moe-mixed", 4, pp=2, pp_layers=[3, 1], ep=2),
    case("moe-mixed", 2, ep=2),
    case("gemma", 1, recompute="full"),
    case("gemma", 2, tp=2, **SP, recompute="selective"),
    case("moe-sinks", 2, tp=2, **SP, etp=1, ep=2),
    case("latent", 2, tp=2),
    case("latent-moe", 2, tp=2, **SP, etp=1, ep=2),
    case("latent-moe-mtp", 2, tp=2, **SP, etp=1, ep=2),
    case("latent-moe-mtp", 2, pp=2, vpp=2),
    case("latent-moe-mtp", 2, cp=2),
    case("latent-moe-mtp", 2, ep=2, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
    case("tied-mtp", 2, tp=2, **SP, recompute="full"),
    case("tied-mtp", 4, pp=2, pp_layers=[3, 1], zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
    case("moe", 4, ep=2, pp=2, vpp=2),
    case("moe", 4, ep=4, zero1=True),
    case("moe", 4, tp=2, **SP, etp=1, ep=2, pp=2),
    case("moe", 4, tp=2, **SP, ep=2, zero1=True),
    case("moe", 4, tp=2, **SP, cp=2),
    case("dense", 8, tp=2, **SP, pp=2, cp=2),
    case("dense", 8, tp=2, **SP, pp=2, vpp=2, zero1=True),
    case("moe", 8, tp=2, **SP, pp=2, ep=2, etp=1, zero1=True),
    case("moe", 8, tp=2, **SP, ep=4, cp=2, etp=1),
]


def config(model: str, layout: dict, train: dict, world_size: int, sections: dict | None = None):
    """sections: further sections of the configuration."""
    from engine.config import validate

    return validate({
        "run": {"dir": "unused", "device": "cpu", "seed": 5},
        "model": MODELS[model],
        "parallel": layout,
        "data": {"train": ["unused"]},
        "train": {"seq_len": SEQ, "global_batch": BATCH, "steps": STEPS, "precision": "fp32", **train},
        # Where a gradient is rounding noise (a key bias, whose true gradient is 0), AdamW with a tiny epsilon turns its sign
        # into a full step; this epsilon keeps the comparison about layouts.
        "optim": {"eps": 1e-5},
        **(sections or {}),
    }, world_size)


class CountTokens(Stage):
    """The pretraining loss without a corpus."""

    def count(self, role, batch):
        return batch["loss_mask"].sum()

    def proportions(self, role, batch):
        return batch["loss_mask"]

    def loss(self, role, output, batch):
        return Loss(sum=-(output * batch["loss_mask"]).sum())


def batches(run, dp_rank: int, dp: int, step: int) -> list[dict]:
    """This replica's micro-batches of one global batch: documents, ragged loss masks, positions restarting."""
    import torch

    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.05] = EOD
    loss_mask = (torch.rand((BATCH, SEQ), generator=generator) < 0.8).float()
    segments = (tokens[:, :-1] == EOD).cumsum(1) - (tokens[:, :-1] == EOD).long()
    starts = torch.zeros(BATCH, SEQ, dtype=torch.long)
    starts[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], torch.arange(1, SEQ), 0)
    positions = torch.arange(SEQ) - starts.cummax(1).values
    whole = dict(tokens=tokens[:, :-1], labels=tokens[:, 1:], loss_mask=loss_mask, position_ids=positions, segment_ids=segments.int(),
                 row=torch.arange(BATCH) + step * BATCH)
    size = run.train.micro_batch
    rows = range(dp_rank * size, BATCH, size * dp)
    return [{name: tensor[row:row + size] for name, tensor in whole.items()} for row in rows]


def train(model: str, layout: dict, extra: dict, world_size: int, sections: dict | None = None):
    """Runs on a rank: (losses, that of further tokens among them, gradient norms, this rank's shards of the weights after STEPS steps)."""
    from engine.mcore import checkpoint, topology
    from engine.mcore.run import ParallelModel

    run = config(model, layout, extra, world_size, sections)
    place = topology.start(run)
    network = ParallelModel(run, place, CountTokens(), "policy")
    if network.pull:
        network.pull.remember(network.chunks)
    losses, norms = [], []
    for step in range(STEPS):
        losses += network.forward_backward(batches(run, place.dp_rank, place.dp, step)).means.values()
        norms.append(network.step(lr=1e-3, number=step + 1))
    network.gather_weights()
    shards = [(key, shape, offset, values.numpy()) for key, shape, offset, values in checkpoint.local_shards(network)]
    return losses, norms, shards


def assemble(results) -> dict:
    """Whole weights from the shards of all ranks."""
    import numpy as np

    whole, seen = {}, {}
    for _, _, shards in results:
        for key, shape, offset, values in shards:
            target, mask = whole.setdefault(key, np.zeros(shape)), seen.setdefault(key, np.zeros(shape, bool))
            place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape))
            target[place], mask[place] = values, True
    missing = [key for key, mask in seen.items() if not mask.all()]
    assert not missing, f"no rank holds all of {missing}"
    return whole


def difference(reference, results) -> tuple[float, float, float]:
    """Largest relative difference of (loss, gradient norm, weights) between a layout and one rank."""
    import numpy as np

    (ref_losses, ref_norms, _), ref_weights = reference[0], assemble(reference)
    loss = max(abs(a - b) / abs(b) for r in results for a, b in zip(r[0], ref_losses))
    norm = max(abs(a - b) / abs(b) for r in results for a, b in zip(r[1], ref_norms))
    weights = assemble(results)
    assert weights.keys() == ref_weights.keys(), weights.keys() ^ ref_weights.keys()
    weight = max(np.linalg.norm(weights[k] - ref_weights[k]) / max(np.linalg.norm(ref_weights[k]), 1e-30) for k in weights)
    return loss, norm, float(weight)


_references: dict = {}


def reference(model: str, micro_batch: int = 1):
    """One rank's run; MoE losses depend on the micro-batch, so it is part of the key."""
    import ranks

    key = (model, micro_batch)
    if key not in _references:
        _references[key] = ranks.run(1, train, model, {}, {"micro_batch": micro_batch} if micro_batch > 1 else {}, 1)
    return _references[key]


def compare(row: Case) -> tuple[float, float, float]:
    import ranks

    micro_batch = row.train.get("micro_batch", 1) if "moe" in row.model else 1
    return difference(reference(row.model, micro_batch), ranks.run(row.ranks, train, row.model, row.layout, row.train, row.ranks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", help="also write the table to this Markdown file")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    lines = ["| layout | loss | gradient norm | weights |", "| --- | --- | --- | --- |"]
    print(*lines, sep="\n")
    worst, start = 0.0, time.time()
    for row in CASES:
        if args.only not in str(row):
            continue
        found = compare(row)
        worst = max(worst, *found)
        lines.append(f"| {row} | " + " | ".join(f"{x:.1e}" for x in found) + " |")
        print(lines[-1], flush=True)
    print(f"{len(lines) - 2} layouts in {time.time() - start:.0f} s, largest difference {worst:.1e}")
    if args.write:
        Path(args.write).write_text(HEADER + "\n".join(lines) + "\n")
    return 0 if worst < LIMIT else 1


HEADER = f"""# Parity: every layout equals one rank

Largest relative difference from one rank over {STEPS} AdamW steps (fp32, {BATCH} samples of {SEQ} tokens per step, document masks, ragged
loss mask, gradient accumulation). Loss: that of further tokens too, where there is one (mtp). Weights: |difference| / |tensor| (L2) of the worst
tensor, after the last step. AdamW's
epsilon is 1e-5 here: where a gradient is rounding noise (a key bias, whose true gradient is 0) a tiny one would turn its sign into a full step.
Written by `make parity`; `tests/test_parity.py` asserts every row.

"""

if __name__ == "__main__":
    sys.exit(main())

"""Drawing answers on a CPU, side by side in the same run: tokens per second of Trireme, of transformers' generate, and of decoding without a cache.

    python benchmarks/generate.py [--rounds 7] [--only ours,hf] [--threads 2]

The quickstart's Llama of 7.5 million parameters (h256 L6 a8/4 ffn688 vocabulary 6144) with random weights, the same in every process; greedy, prompts of
32 tokens, 256 new tokens, 1 and 8 rows. transformers draws with its default cache and fp32 SDPA attention; all rows are equally long, so nobody
pads. `recompute` is what a network without a cache does: the whole text passes for each token. Every contestant lives in a process of its
own; they take turns. The median over the rounds counts. Each contestant's answers are compared: one line says whether they are the same.
"""

import argparse
import statistics
import sys

import _turns

SIZES = dict(hidden=256, layers=6, heads=8, groups=4, ffn=688, vocab=6144)
PROMPT, NEW, SEED = 32, 256, 7


def prompts(step: int, rows: int) -> list[list[int]]:
    import torch

    return torch.randint(0, SIZES["vocab"], (rows, PROMPT), generator=torch.Generator().manual_seed(step)).tolist()


def network():
    """The model, with weights that are drawn by name and so are the same in every process."""
    from engine.config import validate
    from engine.mcore import topology

    run = validate({
        "run": {"dir": "unused", "device": "cpu", "seed": SEED},
        "model": {"family": "llama", "num_layers": SIZES["layers"], "hidden_size": SIZES["hidden"], "ffn_hidden_size": SIZES["ffn"],
                  "num_attention_heads": SIZES["heads"], "num_query_groups": SIZES["groups"], "vocab_size": SIZES["vocab"]},
        "data": {"train": ["unused"]},
        "train": {"seq_len": PROMPT + NEW, "global_batch": 1, "steps": 1, "precision": "fp32"},
    })
    place = topology.start(run)
    from engine.mcore.run import ParallelModel
    from engine.stage import Role
    from engine.stages import build_stage

    return ParallelModel(run, place, build_stage("pretrain"), "policy", Role(train=False))


def ours(rows: int):
    """Trireme, with its cache."""
    from engine.sampling import Sampling

    model = network()
    return lambda i: [answer.tokens for answer in model.generate(prompts(i, rows), Sampling(NEW, temperature=0.0))]


def recompute(rows: int):
    """Trireme's own forward pass of the whole text for each token, logits at the last place alone."""
    import torch

    from engine.mcore.build import bare

    chunk = bare(network().chunks[0]).eval()

    @torch.no_grad()
    def step(i):
        text = torch.tensor(prompts(i, rows))
        for _ in range(NEW):
            hidden = chunk.embedding(text, None)
            hidden = chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=chunk.rotary_pos_emb(text.size(1)))
            logits, _ = chunk.output_layer(hidden[-1:])
            text = torch.cat([text, logits[0, :, :SIZES["vocab"]].argmax(-1, keepdim=True)], 1)
        return text[:, PROMPT:].tolist()

    return step


def hf(rows: int):
    """transformers' generate."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.hf import llama
    from engine.mcore.build import bare

    model = network()
    theirs = LlamaForCausalLM(LlamaConfig(**llama.hf_config(model.run.model, PROMPT + NEW))).eval()
    theirs.load_state_dict(dict(llama.to_hf(model.run.model, {name: value.detach() for name, value in bare(model.chunks[0]).named_parameters()})))
    theirs.generation_config.eos_token_id = None

    def step(i):
        asked = torch.tensor(prompts(i, rows))
        found = theirs.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return found[:, PROMPT:].tolist()

    return step


CONTESTANTS = {"ours:1": (ours, {"rows": 1}), "recompute:1": (recompute, {"rows": 1}), "hf:1": (hf, {"rows": 1}),
               "ours:8": (ours, {"rows": 8}), "hf:8": (hf, {"rows": 8})}  # eight rows without a cache take half a minute a step


def main() -> int:
    arguments = _turns.add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), CONTESTANTS, rounds=7).parse_args()
    contestants = _turns.chosen(CONTESTANTS, arguments.only)
    turns = _turns.take_turns(contestants, arguments, lambda answers: f"first answer {answers[0][0][:4]} ...")
    report(turns)
    return 0


def report(turns) -> None:
    print("\n| contestant:rows | tokens/s | ours / it | its answers are ours |\n| --- | --- | --- | --- |")
    speed = {name: NEW * int(name.partition(":")[2]) / statistics.median(own.seconds) for name, own in turns.items()}
    for name, value in speed.items():
        ours_here = "ours:" + name.partition(":")[2]
        ratio = f"{speed[ours_here] / value:.2f}" if ours_here in speed else ""
        same = str(turns[name].answers == turns[ours_here].answers) if ours_here in speed else ""
        print(f"| {name} | {value:,.0f} | {ratio} | {same} |")


if __name__ == "__main__":
    sys.exit(main())

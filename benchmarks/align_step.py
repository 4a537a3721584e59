"""One optimizer step of the alignment stages on a CPU, side by side with TRL in the same run: our time as a share of its.

    python benchmarks/align_step.py [--rounds 5] [--only dpo,sft:ours] [--threads 2]

A Llama of 22.7 million parameters (h384 L9 a6 ffn1024, vocabulary 8832, untied), fp32. Everybody has the same initial weights and the same
tokens, clips at 1 and runs a fused AdamW. TRL takes part with its own collator, training_step and loss; it checkpoints gradients unless
told otherwise, so it stands here twice: `trl` without, which is faster, and `trl-default` as it comes.

    dpo         4 pairs of 256 tokens, 128 of them prompt. stored, precomputed: the reference's log-probabilities are known beforehand
    dpo-short   the same with a prompt of 16 tokens, so that nearly every token needs logits
    reward      the pairs of dpo
    sft         8 rows of 512 packed with conversations of about 90 tokens (lognormal, at most 512), 60% of each trained. TRL learns from the
                same conversations: all in one padded batch, in padded batches of 8 (its default), or each row flattened (its packing)

The table gives our time as a share of each contestant's, on the wall and of CPU time; the latter is steadier where others use the machine.
Losses of the first steps must agree, or the exit status is 1: all sides learn the same from the same start.
Left out: tokenizing and reading, which neither side does while it steps.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import zlib
from pathlib import Path

import _turns

MODEL = dict(num_layers=9, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, vocab_size=8832)
LR, BETA2, WEIGHT_DECAY, DPO_BETA = 1e-4, 0.95, 0.1, 0.1
PAIRS, PAIR_TOKENS, NUM_PAIRS = 4, 256, 32
ROWS, SEQ, NUM_CONVERSATIONS = 8, 512, 1024
MEDIAN_TOKENS, SIGMA, PROMPT_SHARE = 90, 0.8, 0.4
AGREEMENT = 1e-3  # of losses, relative; fp32 rounding through three optimizer steps stays far below


# --- what everybody starts from ---------------------------------------------------------------------------------------


def weights(shapes):
    """Hugging Face name -> tensor: normal(0, 0.02), norms 1; each drawn from its name."""
    import torch

    def draw(name, shape):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.ones(shape) if "norm" in name else torch.empty(shape).normal_(0, 0.02, generator=generator)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def pair_ids(num_prompt: int):
    """int [pairs, 2, PAIR_TOKENS]: chosen and rejected answers behind a common prompt. 0 is left for padding."""
    import numpy as np

    ids = np.random.default_rng(0).integers(1, MODEL["vocab_size"], (NUM_PAIRS, 2, PAIR_TOKENS))
    ids[:, 1, :num_prompt] = ids[:, 0, :num_prompt]
    return ids


def pairs_of_step(i: int):
    return [(i * PAIRS + k) % NUM_PAIRS for k in range(PAIRS)]


def packed(folder: Path):
    """(engine.data.pack.PackedRows, its ids by conversation, the first token trained of each)."""
    import numpy as np

    from engine.data.conversations import Conversations, Report
    from engine.data.pack import Order, PackedRows, Rows

    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(math.log(MEDIAN_TOKENS), SIGMA, NUM_CONVERSATIONS).astype(int), 8, SEQ)
    ids = [random.integers(1, MODEL["vocab_size"], n) for n in lengths]
    firsts = [int(n * PROMPT_SHARE) for n in lengths]
    corpora = written(folder, ids, [np.arange(n) >= first for n, first in zip(lengths, firsts)])
    rows = Rows(Conversations(*corpora, Report()), SEQ, pack=True)
    return PackedRows([rows], Order([len(rows)], None, 100 * len(rows), 0, False, ["conversations"])), ids, firsts


def written(folder: Path, ids, masks):
    """(tokens, masks) as engine.data keeps them on disk."""
    import numpy as np

    from engine.data.indexed import IndexedCorpus, IndexedWriter

    for name, rows, dtype in (("tokens", ids, np.uint16), ("masks", masks, np.uint8)):
        with IndexedWriter(folder / name, dtype) as writer:
            for row in rows:
                writer.add_document(np.asarray(row, dtype=dtype))
    return IndexedCorpus(folder / "tokens"), IndexedCorpus(folder / "masks")


# --- ours -------------------------------------------------------------------------------------------------------------


def ours_pairs(stage: str, num_prompt: int, reference: str = "role"):
    import numpy as np

    from engine.data import pairs
    from engine.data.preference import Preferences, Report

    ids = pair_ids(num_prompt).reshape(-1, PAIR_TOKENS)
    folder = Path(tempfile.mkdtemp())
    corpora = written(folder, ids, [np.arange(PAIR_TOKENS) >= num_prompt] * len(ids))
    found = Preferences(folder, *corpora, prompts=np.full(len(ids), num_prompt), margins=np.zeros((NUM_PAIRS, 2), np.float32),
                        is_desirable=np.arange(len(ids)) % 2 == 0, report=Report())
    dataset = pairs.in_order(found, PAIR_TOKENS, 100 * NUM_PAIRS)
    return _ours(stage, dataset, PAIR_TOKENS, PAIRS, {"dpo": {"beta": DPO_BETA, "reference": reference}})


def ours_sft():
    return _ours("sft", packed(Path(tempfile.mkdtemp()))[0], SEQ, ROWS, {})


def _ours(stage_name: str, dataset, seq_len: int, batch: int, sections: dict):
    from engine.config import validate
    from engine.mcore import topology

    run = validate({
        "run": {"dir": tempfile.mkdtemp(), "device": "cpu"}, "stage": stage_name, "model": {"family": "llama", **MODEL},
        "data": {"train": ["unused"], "tokenizer": "bytes"},
        "train": {"seq_len": seq_len, "micro_batch": batch, "global_batch": batch, "steps": 1, "precision": "fp32"},
        "optim": {"lr": LR, "beta2": BETA2, "weight_decay": WEIGHT_DECAY}, **sections,
    })
    place = topology.start(run)
    from engine.data.loader import Loader
    from engine.mcore.run import ParallelModel
    from engine.stages import build_stage

    stage = build_stage(stage_name)
    run = stage.configure(run)
    build = lambda name, role: _filled(ParallelModel(run, place, stage, name, role))  # noqa: E731
    models = {name: build(name, role) for name, role in stage.roles.items()}
    make_loader = lambda dataset: Loader(dataset, batch, 0, 1, 8)  # noqa: E731
    if run.dpo.reference == "stored":
        from engine.stage import Role
        from engine.stages.dpo import stored_reference

        stored_reference(run, [dataset], place, make_loader, lambda: build("reference", Role(train=False)))
    loader = make_loader(dataset)

    def step(i):
        for micro_batches in stage.prepare(loader.batches(i * batch, batch), models):
            loss = models["policy"].forward_backward(micro_batches).loss
            models["policy"].step(LR, i + 1)
        return loss

    return step


def _filled(model):
    """The ParallelModel with everybody's weights."""
    from engine.hf import llama
    from engine.mcore import build

    sizes, network = model.run.model, build.bare(model.chunks[0])
    tensors = dict(llama.from_hf(sizes, weights(llama.hf_shapes(llama.hf_config(sizes, SEQ)))))
    if sizes.head == "scalar":
        del tensors["output_layer.weight"]
        tensors["value_head.weight"] = weights({"score.weight": (1, sizes.hidden_size)})["score.weight"]
    build.fill(network, tensors)
    return model


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_dpo(num_prompt: int, checkpointing: bool = False, precompute: bool = False):
    """DPOTrainer; its reference is a second model, or with precompute what it computes once while it is built."""
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it is tokens already

    ids = pair_ids(num_prompt).tolist()
    examples = [{"prompt_ids": chosen[:num_prompt], "chosen_ids": chosen[num_prompt:], "rejected_ids": rejected[num_prompt:]}
                for chosen, rejected in ids]
    arguments = DPOConfig(**_arguments(checkpointing), beta=DPO_BETA, precompute_ref_log_probs=precompute)
    trainer = Prepared(_hf(), None if precompute else _hf(), arguments, train_dataset=_dataset(examples), processing_class=_tokenizer())
    return _trl(trainer, lambda i: [[trainer.train_dataset[k] for k in pairs_of_step(i)]])


def trl_reward(num_prompt: int, checkpointing: bool = False):
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    examples = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pair_ids(num_prompt).tolist()]
    trainer = RewardTrainer(_hf(LlamaForSequenceClassification), RewardConfig(**_arguments(checkpointing)), train_dataset=_dataset(examples),
                            processing_class=_tokenizer())
    return _trl(trainer, lambda i: [[examples[k] for k in pairs_of_step(i)]])


def trl_sft(grouping: str, checkpointing: bool = False):
    """SFTTrainer on the conversations of our rows. grouping: all in one batch, eights, or rows, each flattened into one sequence."""
    import numpy as np
    from trl import SFTConfig, SFTTrainer

    dataset, ids, firsts = packed(Path(tempfile.mkdtemp()))
    examples = [{"input_ids": own.tolist(), "labels": [-100] * first + own[first:].tolist()} for own, first in zip(ids, firsts)]
    arguments = _arguments(checkpointing) | (dict(padding_free=True, max_length=None) if grouping == "rows" else {})
    trainer = SFTTrainer(_hf(), SFTConfig(**arguments), train_dataset=_dataset(examples), processing_class=_tokenizer())

    def micro_batches(i):
        rows = [dataset.sources[0].documents_of(row).tolist() for _, row in dataset.order.where(np.arange(i * ROWS, (i + 1) * ROWS))]
        everything = np.random.default_rng(i).permutation(sum(rows, [])).tolist()
        groups = {"all": [everything], "eights": [everything[k:k + 8] for k in range(0, len(everything), 8)], "rows": rows}[grouping]
        return [[examples[k] for k in group] for group in groups]

    return _trl(trainer, micro_batches)


def _trl(trainer, micro_batches):
    """One optimizer step as Trainer's loop takes it, of the lists of examples that micro_batches(step) gives."""
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=trainer.args.activation_checkpointing_kwargs)
    trainer.model_wrapped = model = trainer.accelerator.prepare(trainer.model)
    optimizer = trainer.create_optimizer()

    def step(i):
        groups = micro_batches(i)
        batches, num_items = trainer.get_batch_samples(map(trainer.data_collator, groups), len(groups), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(groups)
        loss = sum(float(trainer.training_step(model, batch, num_items)) for batch in batches)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        return loss

    return step


def _arguments(checkpointing: bool) -> dict:
    return dict(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=checkpointing, optim="adamw_torch_fused",
                learning_rate=LR, adam_beta2=BETA2, weight_decay=WEIGHT_DECAY, max_grad_norm=1.0, max_length=SEQ, report_to="none", disable_tqdm=True)


def _hf(cls=None):
    """A Llama of transformers with everybody's weights."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.logging.set_verbosity_error()
    config = LlamaConfig(
        vocab_size=MODEL["vocab_size"], hidden_size=MODEL["hidden_size"], intermediate_size=MODEL["ffn_hidden_size"],
        num_hidden_layers=MODEL["num_layers"], num_attention_heads=MODEL["num_attention_heads"], max_position_embeddings=SEQ, rms_norm_eps=1e-5,
        num_labels=1, pad_token_id=0, attn_implementation="sdpa")
    model = (cls or LlamaForCausalLM)(config)
    model.load_state_dict(weights({name: tensor.shape for name, tensor in model.state_dict().items()}))
    return model


def _dataset(examples):
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(examples)


def _tokenizer():
    """What the trainers insist on; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = {"<pad>": 0, "<end>": 1}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(names, "<end>")), pad_token="<pad>", eos_token="<end>")


# --- the contest ------------------------------------------------------------------------------------------------------


def _dpo(case: str, num_prompt: int) -> dict:
    return {
        f"{case}:ours": (ours_pairs, dict(stage="dpo", num_prompt=num_prompt)),
        f"{case}:ours-stored": (ours_pairs, dict(stage="dpo", num_prompt=num_prompt, reference="stored")),
        f"{case}:trl": (trl_dpo, dict(num_prompt=num_prompt)),
        f"{case}:trl-default": (trl_dpo, dict(num_prompt=num_prompt, checkpointing=True)),
        f"{case}:trl-precomputed": (trl_dpo, dict(num_prompt=num_prompt, precompute=True)),
    }


CONTESTANTS = {
    **_dpo("dpo", 128),
    **_dpo("dpo-short", 16),
    "reward:ours": (ours_pairs, dict(stage="reward", num_prompt=128)),
    "reward:trl": (trl_reward, dict(num_prompt=128)),
    "reward:trl-default": (trl_reward, dict(num_prompt=128, checkpointing=True)),
    "sft:ours": (ours_sft, {}),
    "sft:trl": (trl_sft, dict(grouping="all")),
    "sft:trl-eights": (trl_sft, dict(grouping="eights")),
    "sft:trl-eights-default": (trl_sft, dict(grouping="eights", checkpointing=True)),
    "sft:trl-packed": (trl_sft, dict(grouping="rows")),
}


def main() -> int:
    arguments = _turns.add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), CONTESTANTS, rounds=5).parse_args()
    contestants = _turns.chosen(CONTESTANTS, arguments.only)
    num_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # where the contestants' files go
        for case in dict.fromkeys(map(_turns.group, contestants)):  # one at a time, for memory's sake
            own = {name: value for name, value in contestants.items() if _turns.group(name) == case}
            turns = _turns.take_turns(own, arguments, lambda losses: "losses " + ", ".join(f"{x:.5f}" for x in losses))
            if turns:
                report(turns)
                num_wrong += disagreements({name: found.answers for name, found in turns.items()})
    return min(num_wrong, 1)


def report(turns: dict[str, _turns.Turns]) -> None:
    """The table of one case."""
    wall = {name: statistics.median(found.seconds) for name, found in turns.items()}
    cpu = {name: statistics.median(found.cpu_seconds) for name, found in turns.items()}
    columns = [name for name in turns if _is_ours(name)]
    titles = ["contestant", "s per step", "CPU s"] + [name + of for name in columns for of in (" / it", " / it, CPU")]
    print("\n| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
    for name in turns:
        shares = [f"{found[own] / found[name]:.2f}" for own in columns for found in (wall, cpu)]
        print(f"| {name} | {wall[name]:.3f} | {cpu[name]:.3f} | " + " | ".join(shares) + " |")
    print(flush=True)


def _is_ours(name: str) -> bool:
    return name.partition(":")[2].startswith("ours")


def disagreements(losses: dict[str, list[float]]) -> int:
    """The number of contestants of a case whose losses are not those of the first; each is named."""
    first, *others = losses
    found = [name for name in others if not all(abs(a / b - 1) <= AGREEMENT for a, b in zip(losses[name], losses[first]))]
    for name in found:
        print(f"{name}: its losses {losses[name]} are not those of {first}, {losses[first]} (limit {AGREEMENT:g}): they compute something else")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())

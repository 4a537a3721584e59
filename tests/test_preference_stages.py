"""Reward and preference stages over several optimizer steps: every layout equals one rank, and the first DPO loss is ln 2 to the bit.

Pairs of unequal lengths, drawn here; engine/data/pairs.py makes such batches from files (tests/data/test_preference.py).
"""

import math

import numpy as np
import parity_table
import pytest
import ranks

STEPS, SEQ, PAIRS = 3, 32, 4
SP = dict(tp=2, sequence_parallel=True)
STAGES = {
    "reward": ("reward", dict(margin=True, center=0.01)),
    "dpo": ("dpo", dict(loss="dpo", beta=0.5)),
    "dpo+nll": ("dpo", dict(loss="rpo_nll", nll_weight=0.2)),
    "orpo": ("dpo", dict(loss="orpo")),
    "kto": ("dpo", dict(loss="kto", beta=0.5, undesirable_weight=2.0)),
    "rpo": ("dpo", dict(loss="rpo_backward_kl", eta=2.0)),
}


def config(name, model, layout, world_size, micro_batch=1):
    from engine.config import validate

    stage, options = STAGES[name]
    return validate({
        "run": {"dir": "unused", "device": "cpu", "seed": 5},
        "stage": stage,
        "model": parity_table.MODELS[model],
        "parallel": layout,
        "data": {"train": ["unused"], "tokenizer": "bytes"},
        "train": {"seq_len": SEQ, "micro_batch": micro_batch, "global_batch": PAIRS, "steps": STEPS, "precision": "fp32"},
        "optim": {"eps": 1e-5},  # see parity_table.config
        stage: options,
    }, world_size)


def batches(run, place, step):
    """This replica's micro-batches of one global batch."""
    import torch

    per_sample = 1 if run.dpo.loss == "kto" and run.stage == "dpo" else 2
    rows = PAIRS * per_sample
    generator = torch.Generator().manual_seed(step)
    draw = lambda low, high: torch.randint(low, high, (rows,), generator=generator)[:, None]  # noqa: E731
    text = torch.randint(0, parity_table.VOCAB, (3, rows, SEQ + 1), generator=generator)
    begin, end, place_of = draw(2, 10), draw(12, SEQ + 1), torch.arange(SEQ)
    is_answer = ((place_of >= begin - 1) & (place_of < end - 1)).float()  # of the label
    whole = dict(tokens=text[0, :, :-1], labels=text[0, :, 1:], loss_mask=is_answer, position_ids=place_of.repeat(rows, 1),
                 ends=end.squeeze(1) - 1, row=torch.arange(rows), margins=torch.rand(PAIRS, generator=generator).repeat_interleave(per_sample))
    if per_sample == 1:
        whole |= dict(is_desirable=torch.arange(rows) % 3 != 0, kl_tokens=text[1, :, :-1], kl_labels=text[1, :, 1:], kl_loss_mask=is_answer)
    size = run.train.micro_batch * per_sample
    firsts = range(place.dp_rank * size, rows, size * place.dp)
    return [{name: tensor[row:row + size] for name, tensor in whole.items()} for row in firsts]


def train(name, model, layout, world_size, micro_batch=1):
    """Runs on a rank: (losses, gradient norms, weight shards, metrics of each step)."""
    from engine.mcore import checkpoint, topology
    from engine.mcore.run import ParallelModel
    from engine.stages import build_stage

    run = config(name, model, layout, world_size, micro_batch)
    stage = build_stage(run.stage)
    run = stage.configure(run)
    place = topology.start(run)
    models = {role: ParallelModel(run, place, stage, role, spec) for role, spec in stage.roles.items()}
    losses, norms, metrics = [], [], []
    for step in range(STEPS):
        for sub in stage.prepare(batches(run, place, step), models):
            result = models["policy"].forward_backward(sub)
            losses.append(result.loss)
            metrics.append(result.metrics)
            norms.append(models["policy"].step(lr=1e-3))
    models["policy"].gather_weights()
    shards = [(key, shape, offset, values.numpy()) for key, shape, offset, values in checkpoint.local_shards(models["policy"])]
    return losses, norms, shards, metrics


_references = {}


def reference(name, model):
    if (name, model) not in _references:
        _references[name, model] = ranks.run(1, train, name, model, {}, 1)
    return _references[name, model]


def check(name, model, layout):
    one, many = reference(name, model), ranks.run(2, train, name, model, layout, 2)
    found = parity_table.difference([r[:3] for r in one], [r[:3] for r in many])
    assert max(found) < parity_table.LIMIT, "loss {:.1e}, gradient norm {:.1e}, weights {:.1e}".format(*found)
    for expected, *others in zip(one[0][3], *(r[3] for r in many)):
        for other in others:
            assert other == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("layout", [SP, dict(pp=2), dict(cp=2), {}], ids=lambda layout: "-".join(layout) or "dp")
@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_layout_equals_one_rank(name, layout):
    check(name, "dense", layout)


@pytest.mark.parametrize("name, layout", [("dpo+nll", {}), ("orpo", dict(cp=2)), ("orpo", {}), ("kto", {}), ("kto", dict(pp=2)), ("kto", dict(cp=2)),
                                          ("rpo", SP)], ids=str)
def test_other_losses_equal_one_rank(name, layout):
    """What is summed over the whole global batch (tokens of the NLL, kto's reference point) is where replicas could differ."""
    check(name, "dense", layout)


@pytest.mark.parametrize("name, layout", [("reward", dict(ep=2)), ("dpo", dict(ep=2)), ("dpo", dict(pp=2)), ("dpo", {**SP, "etp": 1, "ep": 2})],
                         ids=str)
def test_moe_layout_equals_one_rank(name, layout):
    """With the balancing loss on: it is a mean over tokens, whatever the stage's loss counts."""
    check(name, "moe", layout)


def test_accumulation_changes_nothing():
    """Four micro-batches of one pair, or two of two."""
    one, two = reference("dpo+nll", "dense"), ranks.run(1, train, "dpo+nll", "dense", {}, 1, 2)
    assert max(parity_table.difference([r[:3] for r in one], [r[:3] for r in two])) < parity_table.LIMIT


@pytest.mark.parametrize("layout", [{}, dict(pp=2)], ids=str)
def test_first_dpo_loss_is_ln_2_to_the_bit(layout):
    results = reference("dpo", "dense") if not layout else ranks.run(2, train, "dpo", "dense", layout, 2)
    for losses, _, _, metrics in results:
        assert losses[0] == float(np.float32(math.log(2)))
        assert metrics[0]["rewards/margin"] == 0 and metrics[0]["rewards/accuracy"] == 0
        assert losses[-1] != losses[0]


def test_what_the_loss_would_ignore_is_refused():
    from engine.config import ConfigError
    from engine.stages import build_stage

    cases = [(dict(loss="dpo", label_smoothing=0.1), "label_smoothing=0.1 is read by dpo.loss=cdpo and robust only"),
             (dict(loss="rpo_nll"), "nll_weight"), (dict(loss="kto", reference="stored"), "mismatched pairs"),
             (dict(loss="simpo", reference="stored"), "has no reference"), (dict(loss="hinge", gamma=1.0), "gamma"),
             (dict(loss="dpo", eta=2.0), "eta"), (dict(loss="dpo", desirable_weight=2.0), "desirable_weight")]
    plain = config("dpo", "dense", {}, 1)
    for options, words in cases:
        run = plain.model_copy(update={"dpo": type(plain.dpo)(**options)})
        with pytest.raises(ConfigError, match=words):
            build_stage("dpo").configure(run)
    lonely = plain.model_copy(update={"dpo": type(plain.dpo)(loss="kto"), "train": plain.train.model_copy(update={"global_batch": 1})})
    with pytest.raises(ConfigError, match="raise it to 2"):
        build_stage("dpo").configure(lonely)


def test_roles_follow_the_loss():
    from engine.stages import build_stage

    plain = config("dpo", "dense", {}, 1)
    for options, roles in ((dict(), {"policy", "reference"}), (dict(loss="simpo"), {"policy"}), (dict(reference="stored"), {"policy"})):
        stage = build_stage("dpo")
        run = stage.configure(plain.model_copy(update={"dpo": type(plain.dpo)(**options)}))
        assert stage.roles.keys() == roles and not run.checkpoint.load_position
    stage = build_stage("reward")
    run = stage.configure(config("reward", "dense", {}, 1))
    assert run.model.head == "scalar" and stage.roles["policy"].head == "scalar" and not run.checkpoint.load_position


# --- through the loop, from files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs that a model can learn: the better answer repeats the word of the prompt."""
    from chats import write_jsonl

    random, words = np.random.RandomState(0), ["red", "blue", "green", "pink"]
    drawn = [(words[random.randint(4)], words[random.randint(4)]) for _ in range(24)]
    lines = [{"prompt": word, "chosen": f"{word} {word}", "rejected": f"{other} no"} for word, other in drawn]
    folder = tmp_path_factory.mktemp("pairs")
    return {name: write_jsonl(folder / f"{name}.jsonl", part) for name, part in (("train", lines[:20]), ("held_out", lines[20:]))}


@pytest.fixture
def raw_run(files, tmp_path):
    return {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "seed": 11},
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 257},
        "data": {"train": [files["train"]], "valid": {"held_out": [files["held_out"]]}, "tokenizer": "bytes"},
        "chat": {"template": "tags", "workers": 1},
        "train": {"seq_len": 128, "global_batch": 4, "steps": 20, "precision": "fp32", "eval_samples": 4},
        "optim": {"lr": 3e-3},
        "schedule": {"kind": "constant"},
        "log": {"tensorboard": False, "every": 20},
    }


def steps_and_validation(lines):
    return [line for line in lines if "lr" in line], [line for line in lines if "lr" not in line]


@pytest.mark.parametrize("options", [{"loss": "dpo"}, {"loss": "kto"}, {"reference": "stored"}], ids=str)
def test_preferences_are_learned_through_the_loop(raw_run, options):
    from training import on_ranks

    steps, _ = steps_and_validation(on_ranks(1, {**raw_run, "stage": "dpo", "dpo": {"beta": 0.5, **options}}))
    start = 0.5 if options.get("loss") == "kto" else math.log(2)
    assert len(steps) == 20 and steps[0]["loss"] == pytest.approx(start, rel=1e-5 if "loss" in options else 1e-4)
    assert np.mean([step["loss"] for step in steps[-4:]]) < 0.8 * start
    assert steps[-1]["rewards/chosen"] > steps[-1]["rewards/rejected"]


def test_a_reward_model_learns_through_the_loop(raw_run):
    from training import on_ranks

    steps, _ = steps_and_validation(on_ranks(1, {**raw_run, "stage": "reward"}))
    assert np.mean([step["loss"] for step in steps[-4:]]) < 0.3 and steps[-1]["accuracy"] > 0.9, steps


def test_the_reference_of_an_adapted_policy(raw_run, tmp_path):
    """Adapters from scratch: the reference is the model without them. Adapters that go on: it has those that were loaded. Either way
    policy and reference begin equal, and the first loss is ln 2."""
    from training import merged, on_ranks

    raw_run = merged(raw_run, {"stage": "dpo", "lora": {"rank": 4}})
    first = on_ranks(1, raw_run)
    assert first[0]["loss"] == float(np.float32(np.log(2))) and first[-1]["loss"] < 0.65
    then = on_ranks(1, merged(raw_run, {"run": {"dir": str(tmp_path / "then")}, "checkpoint": {"load": raw_run["run"]["dir"], "load_optimizer": False}}))
    assert then[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert then[0]["logps/rejected"] < first[0]["logps/rejected"]

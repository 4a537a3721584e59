"""Preference losses against TRL: its own trainers on a tiny transformers Llama, the engine on the same weights and the same answers.

Where TRL has the loss, the whole path is compared (log-probabilities, masks, loss, gradient norm, logged metrics); formulas that TRL's
trainers reach in another way are called as their methods; what TRL lacks is computed from the papers with numpy in float64.
"""

import copy

import numpy as np
import pytest
import ranks
import torch

from engine import losses

pytestmark = pytest.mark.filterwarnings("ignore:.*(TRL|trl|deprecated|remove_unused_columns|parallel).*")  # of TRL, about itself
VOCAB, SEQ = 90, 16
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=None)
PAIRS = [  # prompt, chosen, rejected: of unequal lengths; each prompt is one token, where ORPO's NLL over prompt and answer is ours over the answer
    ([7], [8, 9, 10, 2], [11, 2]),
    ([20], [21, 2], [22, 23, 24, 25, 26, 2]),
    ([30], [31, 32, 2], [33, 34, 35, 2]),
    ([40], [41, 42, 43, 44, 2], [45, 46, 2]),
]
LONG_PROMPTS = [(list(range(50, 50 + i)) + prompt, chosen, rejected) for i, (prompt, chosen, rejected) in enumerate(PAIRS)]
LABELS = [True, False, False, True]
MARGINS = [0.5, -0.25, 1.0, 0.0]
BETA = 0.3


# --- the engine's side, on a rank -------------------------------------------------------------------------------------


def rows_of(sequences):
    """[(prompt, answer)] -> the engine's batch: row by row, label shifted by one, the mask on labels that are answer tokens."""
    batch = {name: torch.zeros(len(sequences), SEQ, dtype=torch.long) for name in ("tokens", "labels")}
    batch["loss_mask"] = torch.zeros(len(sequences), SEQ)
    batch["position_ids"] = torch.arange(SEQ).repeat(len(sequences), 1)
    for i, (prompt, answer) in enumerate(sequences):
        ids = prompt + answer
        batch["tokens"][i, :len(ids)] = torch.tensor(ids)
        batch["labels"][i, :len(ids) - 1] = torch.tensor(ids[1:])
        batch["loss_mask"][i, len(prompt) - 1:len(ids) - 1] = 1
    batch["ends"] = torch.tensor([len(prompt + answer) - 1 for prompt, answer in sequences])
    return batch


def paired(data):
    batch = rows_of([(prompt, answer) for prompt, *answers in data for answer in answers])
    batch["margins"] = torch.tensor(MARGINS).repeat_interleave(2)
    return batch


def unpaired(data):
    answers = [chosen if label else rejected for (_, chosen, rejected), label in zip(data, LABELS)]
    batch = rows_of([(prompt, answer) for (prompt, _, _), answer in zip(data, answers)])
    mismatched = rows_of([(prompt, answer) for (prompt, _, _), answer in zip(data, answers[-1:] + answers[:-1])])
    return {**batch, "is_desirable": torch.tensor(LABELS), **{f"kl_{name}": mismatched[name] for name in ("tokens", "labels", "loss_mask")}}


def config(stage, options, tokenizer):
    from engine.config import validate

    llama = dict(family="llama", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=VOCAB,
                 norm_eps=1e-6)
    return validate({"run": {"dir": "unused", "device": "cpu"}, "stage": stage, "model": llama, stage: options,
                     "data": {"train": ["unused"], "tokenizer": f"hf:{tokenizer}"},
                     "train": {"seq_len": SEQ, "micro_batch": 4, "global_batch": 4, "steps": 1, "precision": "fp32"},
                     "optim": {"clip_grad": 0}}, 1)


def engine(stage_name, folders, jobs):
    """Runs on a rank: for each (options, batch), (loss, metrics, gradient norm) with the roles' weights from HF folders."""
    from engine.mcore import topology
    from engine.mcore.build import bare, fill
    from engine.mcore.run import ParallelModel
    from engine.stages import build_stage

    found = []
    for options, batch in jobs:
        stage = build_stage(stage_name)
        run = stage.configure(config(stage_name, options, folders["tokenizer"]))
        place = topology.start(run)
        models = {}
        for name, role in stage.roles.items():
            models[name] = ParallelModel(run, place, stage, name, role)
            fill(bare(models[name].chunks[0]), tensors_of(run.model, folders[name]))
            if role.train:
                models[name].optimizer.reload_model_params()
        (step,) = stage.prepare([batch], models)
        result = models["policy"].forward_backward(step)
        found.append((result.loss, result.metrics, models["policy"].step(lr=0.0)))
    return found


def tensors_of(model, folder):
    """A folder of LlamaForCausalLM, or of the sequence classifier that TRL trains rewards with, by the engine's names."""
    from safetensors.torch import load_file

    from engine.hf import FAMILIES

    return dict(FAMILIES["llama"].from_hf(model, load_file(f"{folder}/model.safetensors")))


# --- TRL's side -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """A word per id, as TRL's trainers ask for a tokenizer; no id below comes from it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """name -> (network, its folder): a policy, another reference, a reward model; weights large enough for losses to differ."""
    import transformers

    made = {}
    for seed, (name, kind) in enumerate({"policy": "CausalLM", "reference": "CausalLM", "reward": "SequenceClassification"}.items()):
        options = dict(num_labels=1) if name == "reward" else {}
        torch.manual_seed(seed)
        network = getattr(transformers, f"LlamaFor{kind}")(transformers.LlamaConfig(**SIZES, **options))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
        folder = tmp_path_factory.mktemp(name)
        network.save_pretrained(folder)
        made[name] = network, folder
    return made


@pytest.fixture(scope="module")
def folders(llamas, tokenizer, tmp_path_factory):
    """What the engine reads: role -> folder, and the tokenizer's."""
    home = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(home)
    return {"policy": str(llamas["policy"][1]), "reference": str(llamas["reference"][1]), "tokenizer": str(home)}


@pytest.fixture(scope="module")
def trainer(tokenizer, llamas, tmp_path_factory):
    """trainer(kind, **options) -> a TRL trainer over fresh copies of the tiny models."""
    import datasets
    import trl
    import trl.experimental.cpo
    import trl.experimental.orpo

    homes = {"CPO": trl.experimental.cpo, "ORPO": trl.experimental.orpo}
    text = {"prompt": ["w3 w4", "w5"], "chosen": [" w6", " w7"], "rejected": [" w8", " w9"]}
    columns = {"KTO": {"prompt": text["prompt"], "completion": text["chosen"], "label": [True, False]},
               "Reward": {name: text[name] for name in ("chosen", "rejected")}}

    def make(kind, **options):
        home, role = homes.get(kind, trl), "reward" if kind == "Reward" else "policy"
        args = getattr(home, f"{kind}Config")(output_dir=str(tmp_path_factory.mktemp(kind)), use_cpu=True, report_to="none", bf16=False,
                                              gradient_checkpointing=False, disable_tqdm=True, per_device_train_batch_size=2, **options)
        models = {"model": copy.deepcopy(llamas[role][0])}
        if kind in ("DPO", "KTO"):
            models["ref_model"] = copy.deepcopy(llamas["reference"][0])
        return getattr(home, f"{kind}Trainer")(**models, args=args, processing_class=tokenizer,
                                               train_dataset=datasets.Dataset.from_dict(columns.get(kind, text)))

    return make


def outcome(trainer, inputs):
    """(loss, gradient norm) of a trainer's own compute_loss; what it logs is in trainer._metrics["train"]."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), float(torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm())


def example_rows(data):
    return [dict(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected) for prompt, chosen, rejected in data]


def concatenated(data):
    """The batch that CPO's and ORPO's get_batch_loss_metrics takes."""
    batch = {}
    for side, name in ((1, "chosen"), (2, "rejected")):
        sequences = [(row[0], row[side]) for row in data]
        width = max(len(prompt + answer) for prompt, answer in sequences)
        pad = lambda rows, value: torch.tensor([row + [value] * (width - len(row)) for row in rows])  # noqa: E731, B023
        batch[f"{name}_input_ids"] = pad([prompt + answer for prompt, answer in sequences], 0)
        batch[f"{name}_attention_mask"] = pad([[1] * len(prompt + answer) for prompt, answer in sequences], 0)
        batch[f"{name}_labels"] = pad([[-100] * len(prompt) + answer for prompt, answer in sequences], -100)
    return batch


def agree(ours, theirs):
    """To 1e-5, of the number itself or of 1: an implicit reward is a small difference of large sums."""
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), f"engine {ours}, TRL {theirs}"


# --- whole paths ------------------------------------------------------------------------------------------------------

DPO_CASES = {
    "dpo": (dict(loss="dpo", beta=BETA), dict(loss_type=["sigmoid"])),
    "robust": (dict(loss="robust", beta=BETA, label_smoothing=0.1), dict(loss_type=["robust"], label_smoothing=0.1)),
    "hinge": (dict(loss="hinge", beta=BETA), dict(loss_type=["hinge"])),
    "ipo_mean": (dict(loss="ipo_mean", beta=BETA), dict(loss_type=["ipo"])),
    "rpo_nll": (dict(loss="rpo_nll", beta=BETA, nll_weight=0.2), dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])),
    "hinge with nll": (dict(loss="hinge", beta=BETA, nll_weight=0.7), dict(loss_type=["hinge", "sft"], loss_weights=[1.0, 0.7])),
}


@pytest.fixture(scope="module")
def engine_dpo(folders):
    jobs = [(options, paired(LONG_PROMPTS)) for options, _ in DPO_CASES.values()]
    return dict(zip(DPO_CASES, ranks.run(1, engine, "dpo", folders, jobs)[0]))


@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_equals_trl(case, trainer, engine_dpo):
    loss, metrics, norm = engine_dpo[case]
    theirs = trainer("DPO", beta=BETA, **DPO_CASES[case][1])
    their_loss, their_norm = outcome(theirs, theirs.data_collator(example_rows(LONG_PROMPTS)))
    agree(loss, their_loss)
    agree(norm, their_norm)
    logged = {name: values[-1] for name, values in theirs._metrics["train"].items()}
    for ours, name in (("rewards/chosen",) * 2, ("rewards/rejected",) * 2, ("rewards/accuracy", "rewards/accuracies"),
                       ("rewards/margin", "rewards/margins"), ("logps/chosen",) * 2, ("logps/rejected",) * 2):
        agree(metrics[ours], logged[name])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5)])
def test_kto_equals_trl(weights, trainer, folders):
    options = dict(loss="kto", beta=BETA, desirable_weight=weights[0], undesirable_weight=weights[1])
    ((loss, metrics, norm),), = ranks.run(1, engine, "dpo", folders, [(options, unpaired(LONG_PROMPTS))])
    theirs = trainer("KTO", beta=BETA, desirable_weight=weights[0], undesirable_weight=weights[1])
    answers = [chosen if label else rejected for (_, chosen, rejected), label in zip(LONG_PROMPTS, LABELS)]
    rows = [dict(prompt_ids=prompt, completion_ids=answer, KL_completion_ids=other, label=label)
            for (prompt, _, _), answer, other, label in zip(LONG_PROMPTS, answers, answers[-1:] + answers[:-1], LABELS)]
    their_loss, their_norm = outcome(theirs, theirs.data_collator(rows))
    agree(loss, their_loss)
    agree(norm, their_norm)
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl"):
        agree(metrics[name], theirs._metrics["train"][name][-1])


def test_kto_reference_point_is_not_negative(folders):
    """With the roles exchanged the mean of the mismatched pairs changes its sign; only one of the two points is above 0."""
    options = dict(loss="kto", beta=BETA)
    exchanged = {**folders, "policy": folders["reference"], "reference": folders["policy"]}
    points = [ranks.run(1, engine, "dpo", roles, [(options, unpaired(LONG_PROMPTS))])[0][0][1]["kl"] for roles in (folders, exchanged)]
    assert min(points) == 0 < max(points)


@pytest.mark.parametrize("options, theirs", [
    (dict(loss="simpo", beta=2.0, gamma=0.5), dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)),
    (dict(loss="simpo", beta=2.0, gamma=1.0, nll_weight=0.3), dict(loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.3)),
])
def test_simpo_equals_trl(options, theirs, trainer, folders):
    ((loss, metrics, _),), = ranks.run(1, engine, "dpo", folders, [(options, paired(LONG_PROMPTS))])
    cpo = trainer("CPO", **theirs)
    their_loss, logged = cpo.get_batch_loss_metrics(cpo.model, concatenated(LONG_PROMPTS))
    agree(loss, float(their_loss))
    for ours, name in (("rewards/chosen",) * 2, ("rewards/rejected",) * 2, ("rewards/accuracy", "rewards/accuracies")):
        agree(metrics[ours], logged[name])


def test_orpo_equals_trl(trainer, folders):
    options = dict(loss="orpo", beta=BETA)
    ((loss, metrics, _),), = ranks.run(1, engine, "dpo", folders, [(options, paired(PAIRS))])
    orpo = trainer("ORPO", beta=BETA)
    their_loss, logged = orpo.get_batch_loss_metrics(orpo.model, concatenated(PAIRS))
    agree(loss, float(their_loss))
    agree(metrics["rewards/chosen"], logged["rewards/chosen"])


@pytest.mark.parametrize("options", [{}, {"margin": True}, {"center": 0.01}, {"margin": True, "center": 0.1}], ids=str)
def test_reward_equals_trl(options, trainer, folders, llamas):
    roles = {**folders, "policy": str(llamas["reward"][1])}
    ((loss, metrics, norm),), = ranks.run(1, engine, "reward", roles, [(options, paired(LONG_PROMPTS))])
    theirs = trainer("Reward", center_rewards_coefficient=options.get("center"))
    rows = [dict(chosen_ids=prompt + chosen, rejected_ids=prompt + rejected, **({"margin": margin} if options.get("margin") else {}))
            for (prompt, chosen, rejected), margin in zip(LONG_PROMPTS, MARGINS)]
    their_loss, their_norm = outcome(theirs, theirs.data_collator(rows))
    agree(loss, their_loss)
    agree(norm, their_norm)
    for ours, name in (("accuracy",) * 2, ("margin",) * 2, ("reward", "mean_reward")):
        agree(metrics[ours], theirs._metrics["train"][name][-1])


# --- formulas ---------------------------------------------------------------------------------------------------------


def numbers(*shape, seed=0, scale=4.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_cdpo_equals_trls_smoothed_sigmoid(epsilon, trainer):
    """TRL's DPO has no smoothing; its CPO has, and gets log-ratios here where it would take log-probabilities."""
    u = numbers(10)
    cpo = trainer("CPO", loss_type="sigmoid", beta=BETA, label_smoothing=epsilon)
    agree(losses.cdpo(losses.difference(u), BETA, epsilon).tolist(), cpo.cpo_loss(u[0::2], u[1::2])[0].tolist())


def test_ipo_of_sums_equals_trls(trainer):
    u = numbers(10)
    cpo = trainer("CPO", loss_type="ipo", beta=BETA)
    agree(losses.ipo_sum(losses.difference(u), BETA).tolist(), cpo.cpo_loss(u[0::2], u[1::2])[0].tolist())


def test_reward_aware_losses_equal_the_papers():
    D, scores, beta, eta = numbers(20).numpy(), numbers(20, seed=1, scale=1.0).numpy(), 0.7, 1.5
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    kl = lambda p, q: p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))  # noqa: E731
    model, annotated = sigmoid(beta * D), sigmoid(eta * scores)
    ours = [getattr(losses, name)(torch.from_numpy(D), torch.from_numpy(scores), beta, eta).numpy()
            for name in ("rpo_squared", "rpo_backward_kl", "rpo_forward_kl")]
    np.testing.assert_allclose(ours, [(beta * D - eta * scores) ** 2, kl(annotated, model), kl(model, annotated)], rtol=1e-9)
    at_goal = losses.rpo_backward_kl(torch.from_numpy(eta * scores / beta), torch.from_numpy(scores), beta, eta)
    np.testing.assert_allclose(at_goal, 0, atol=1e-12)


def test_robust_is_unbiased_under_flips():
    """Its expectation over flipped labels is the loss without flips; cdpo's is not."""
    D, epsilon = numbers(20), 0.2
    mean = (1 - epsilon) * losses.robust(D, BETA, epsilon) + epsilon * losses.robust(-D, BETA, epsilon)
    torch.testing.assert_close(mean, losses.dpo(D, BETA), rtol=1e-12, atol=1e-12)


def test_log1mexp_keeps_its_digits():
    x = np.array([-1e-12, -1e-3, -0.5, -0.6931471805599453, -0.7, -5.0, -40.0])
    import mpmath

    mpmath.mp.dps = 50

    expected = [float(mpmath.log(1 - mpmath.exp(mpmath.mpf(v)))) for v in x]
    np.testing.assert_allclose(losses.log1mexp(torch.from_numpy(x)), expected, rtol=1e-12)


LENGTHS = torch.tensor([3.0, 5.0, 2.0, 7.0, 4.0, 4.0], dtype=torch.float64)
LOGPS = -numbers(6, seed=2).abs() - 0.1
DESIRABLE = torch.tensor([True, False, True, False, False, True])
FUNCTIONS = {
    "dpo": lambda u: losses.dpo(losses.difference(u), BETA),
    "cdpo": lambda u: losses.cdpo(losses.difference(u), BETA, 0.1),
    "robust": lambda u: losses.robust(losses.difference(u), BETA, 0.1),
    "hinge": lambda u: losses.hinge(losses.difference(u), BETA),
    "ipo_sum": lambda u: losses.ipo_sum(losses.difference(u), BETA),
    "ipo_mean": lambda u: losses.ipo_mean(u, LENGTHS, BETA),
    "kto": lambda u: losses.kto(u, DESIRABLE, torch.tensor(0.4), BETA, 2.0, 0.5),
    "simpo": lambda u: losses.simpo(u, LENGTHS, BETA, 0.5),
    "orpo": lambda u: losses.orpo(u, LENGTHS, -u[0::2], BETA),
    "rpo_nll": lambda u: losses.rpo_nll(losses.difference(u), -u[0::2], BETA, 0.2),
    "rpo_squared": lambda u: losses.rpo_squared(losses.difference(u), LENGTHS[:3], BETA, 0.5),
    "rpo_backward_kl": lambda u: losses.rpo_backward_kl(losses.difference(u), LENGTHS[:3], BETA, 0.5),
    "rpo_forward_kl": lambda u: losses.rpo_forward_kl(losses.difference(u), LENGTHS[:3], BETA, 0.5),
    "bradley_terry": lambda u: losses.bradley_terry(*losses.pairs(u), LENGTHS[:3], 0.1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_equal_finite_differences(name):
    assert torch.autograd.gradcheck(FUNCTIONS[name], LOGPS.clone().requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_answers_keep_finite_losses_and_gradients(name):
    for size in (0.0, 1e-18, 1e-6, 1e4):
        u = (-torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64) * size).requires_grad_()
        loss = FUNCTIONS[name](u)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(u.grad).all()


def test_pairs_and_ends():
    x = torch.arange(6.0)
    assert [part.tolist() for part in losses.pairs(x)] == [[0, 2, 4], [1, 3, 5]] and losses.difference(x).tolist() == [-1, -1, -1]
    assert losses.rewards(torch.arange(6.0).view(2, 3), torch.tensor([2, 0])).tolist() == [2, 3]
    logp = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    assert losses.sequence_logps(logp, torch.tensor([[1.0, 0, 1], [0, 1, 1]])).tolist() == [-5, -48]

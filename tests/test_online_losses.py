"""The online stages from answers to losses: loops written from the papers' formulas, in float64, and TRL's own loss of a prepared batch.

Networks are tables: log p of a token after the one before it, and a value for a token at its place; what lies where loss_mask is 0 is a
number that would be seen. A stage is driven as the loop drives it, on one replica or on two, with rows that only fill a micro-batch. Left out:
answers as they are drawn, and networks (test_online.py, test_bandit.py).
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_rl import numbers, on_replicas, trl_inputs, trl_self
from training import merged

from engine.sampling import Generated, Sampling
from engine.stages.online import Answer

pytestmark = pytest.mark.filterwarnings("ignore:.*(TRL|trl|deprecated).*")
VOCAB, MAX_NEW_TOKENS = 7, 6
OLD, REFERENCE = (numbers(VOCAB, VOCAB, seed=seed).log_softmax(1) for seed in (1, 2))
MOVED = OLD + numbers(VOCAB, VOCAB, seed=3, scale=0.5)                          # logits of the policy after some updates
VALUES = numbers(VOCAB, 16, seed=4)
MOVED_VALUES = VALUES + numbers(VOCAB, 16, seed=5, scale=0.5)
PROMPTS = {4: [1, 2], 5: [3], 6: [4, 5, 6, 1]}                                  # sample number: its tokens
ANSWERS = {4: [[3, 1, 4, 1, 5], [2], [6, 5, 3]], 5: [[5, 0, 2, 6], [4, 4, 3, 2, 1, 0], [1, 6]], 6: [[0, 1], [2, 3, 4], [5, 6, 0, 2, 1]]}
SCORES = {4: [1.0, 0.25, -0.5], 5: [-1.5, 0.5, 1.0], 6: [0.75, 0.0, 0.25]}
RAW = {
    "run": {"device": "cpu", "dir": "unused"},
    "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 257},
    "data": {"train": ["unused"], "tokenizer": "bytes"}, "chat": {"template": "tags"},
    "rollout": {"samples_per_prompt": 3, "max_new_tokens": MAX_NEW_TOKENS, "micro_batch": 4},
    "rewards": [{"kind": "exact", "weight": 2.0}],
    "train": {"seq_len": 16, "micro_batch": 1, "global_batch": 3, "steps": 4},
}


def near(ours, theirs):
    """Up to the rounding of what stages keep in fp32: rewards, advantages per answer, log-probabilities of the rollout."""
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-6, atol=2e-7)


def new_answers():
    """Answers of the table OLD, as a generation in another precision computed it."""
    noise = np.random.default_rng(6)
    found = []
    for number, prompt in PROMPTS.items():
        for tokens, score in zip(ANSWERS[number], SCORES[number]):
            one = Answer(number, prompt + tokens, len(prompt), [], len(tokens) < 5, "", {"exact": score})
            one.logps = [float(np.float32(OLD[before, token] + noise.normal() * 0.2)) for before, token in moves(one)]
            found.append(one)
    return found


def moves(answer):
    """(the token before it, the token) for each token of an answer."""
    return list(zip(answer.tokens[answer.start - 1:], answer.tokens[answer.start:]))


# --- driving a stage ----------------------------------------------------------------------------------------------------


class Network:
    """What a stage asks of a role: a table, [token before, token] of log-probabilities or [token, place] of values."""

    last: dict = {}

    def __init__(self, table, total):
        self.table, self.total = table, total

    def score(self, rows):
        return [read(self.table, row) for row in rows]


def read(table, row, wants_entropy=False):
    """The role's output for a micro-batch; wants_entropy: of a policy that learns, [b, s, 2]."""
    if table.shape != (VOCAB, VOCAB):
        return table[row["tokens"], row["position_ids"]]
    logp = table.log_softmax(1)
    output = logp[row["tokens"], row["labels"]]
    if wants_entropy:
        output = torch.stack([output, -(logp.exp() * logp).sum(1)[row["tokens"]]], -1)
    is_asked = row["loss_mask"] > 0
    return torch.where(is_asked[..., None] if wants_entropy else is_asked, output, 50.0)


def placed(raw, rank, dp, state=None):
    """A stage on one of dp replicas."""
    from engine.config import validate
    from engine.stages import build_stage
    from engine.train import Trainer

    stage = build_stage(raw["stage"])
    run = stage.configure(validate(raw, dp))
    stage.restore(state or {})
    stage.trainer = Trainer(run, stage, SimpleNamespace(dp=dp, dp_rank=rank, pp=1, sequence_multiple=lambda run: 4))
    return stage


def driven(raw, answers, dp=1, state=None):
    """(a stage, its updates: lists of micro-batches) for each replica, and the answers' rewards. state: what a checkpoint holds of the stage."""
    def on_replica(rank, total):
        stage = placed(raw, rank, dp, state)
        if rank == 0:
            for answer in answers:
                answer.reward = stage.reward(answer)
        total(torch.zeros(1))  # the others wait for the rewards
        networks = {"policy": Network(OLD, total), "reference": Network(REFERENCE, total), "critic": Network(VALUES, total)}
        return stage, list(stage.prepare(answers, {role: networks[role] for role in stage.roles}))

    return on_replicas(list(range(dp)), on_replica)


def minimised(replicas, update, table, role="policy"):
    """(what an update minimises, the means of the metrics) as the engine sums and divides them."""
    found, count, sums = 0.0, 0.0, {}
    for stage, updates in replicas:
        for row in updates[update]:
            loss = stage.loss(role, read(table, row, stage.roles[role].wants_entropy), row)
            found, count = found + loss.sum, count + float(stage.count(role, row))
            for name, pair in loss.metrics.items():
                sums[name] = [a + float(x) for a, x in zip(sums.get(name, (0.0, 0.0)), pair)]
    return found / count, {name: total / n for name, (total, n) in sums.items()}


def compared(replicas, update, table, expected, role="policy"):
    """Values and gradients by the table's numbers are those that `expected`, a function of the table, says."""
    table = table.clone().requires_grad_()
    ours, metrics = minimised(replicas, update, table, role)
    theirs = expected(table)
    near(ours.detach(), theirs.detach())
    near(*(torch.autograd.grad(x, table, retain_graph=True)[0] for x in (ours, theirs)))
    return metrics


# --- the policy's loss, written out ---------------------------------------------------------------------------------------


def clip(x, low, high):
    return torch.clamp(x, low, high)


def policy_terms(loss, o, cap, answer, advantages, logp, old):
    """-gain of each token of an answer; advantages: one per token. old: the table the first ratio is taken with, None for the policy's own."""
    now = torch.stack([logp[move] for move in moves(answer)])
    was = now.detach() if old is None else torch.stack([old[move] for move in moves(answer)])
    rho = (now - was).exp()
    if loss == "rloo":
        rho = (now.sum() - was.sum()).exp().expand(len(now))
    if loss == "gspo":  # GSPO-token: the value of the sequence's ratio, the gradient of the token's own
        rho = (now.mean() - was.mean()).exp().detach() * (now - now.detach()).exp()
    high = o.clip_high or o.clip
    terms = []
    for t, A in enumerate(advantages):
        if loss == "cispo":
            term = -clip(rho[t], 1 - o.clip, 1 + high).detach() * A * now[t]
        else:
            gain = min(rho[t] * A, clip(rho[t], 1 - o.clip, 1 + high) * A)
            term = -(max(gain, torch.tensor(o.dual_clip * A)) if o.dual_clip and A < 0 else gain)
        terms.append(term * min(float((was[t].detach() - answer.logps[t]).exp()), cap) if cap else term)
    return terms


def entropy(logp, before):
    return -(logp[before].exp() * logp[before]).sum()


def divergence(kind, D):
    return {"k1": D, "k2": D * D / 2, "k3": torch.exp(-D) - 1 + D}[kind]


def mean(numbers):
    return sum(numbers) / len(numbers)


def averaged(terms, average):
    """terms: a list per answer."""
    match average:
        case "sequences":
            return mean([mean(one) for one in terms])
        case "tokens":
            return mean([x for one in terms for x in one])
        case "fixed":
            return sum(x for one in terms for x in one) / (len(terms) * MAX_NEW_TOKENS)


# --- grpo ------------------------------------------------------------------------------------------------------------------

AVERAGES = {"grpo": "sequences", "gspo": "sequences", "rloo": "sequences", "dapo": "tokens", "cispo": "tokens", "reinforce": "tokens",
            "dr_grpo": "fixed"}
PENALTIES = {"rollout": {"reward_clip": 1.5, "missing_eos_penalty": 0.5}}


def answer_rewards(answers, overlong=0):
    """With PENALTIES: twice the score, within 1.5, less a half without an end, less DAPO's penalty over the last `overlong` tokens."""
    too_long = lambda one: max(0, one.length - MAX_NEW_TOKENS + overlong) / overlong if overlong else 0  # noqa: E731
    return [min(max(2 * one.scores["exact"], -1.5), 1.5) - 0.5 * (not one.ended) - too_long(one) for one in answers]


def group_advantages(loss, rewards):
    groups, found = np.array(rewards).reshape(-1, 3), []
    for group in groups:
        for i, R in enumerate(group):
            match loss:
                case "dr_grpo":
                    found.append(R - group.mean())
                case "rloo":
                    found.append(R - np.delete(group, i).mean())
                case "reinforce":
                    found.append((R - groups.mean()) / np.sqrt(groups.var(ddof=1) + 1e-8))
                case _:
                    found.append((R - group.mean()) / (group.std(ddof=1) + 1e-6))
    return found


EXTRAS = {
    "one update": {},
    "penalties and divergence": merged(PENALTIES, {"grpo": {"kl_coef": 0.3, "kl": "k2", "overlong_buffer": 4}}),
    "all": merged(PENALTIES, {"rollout": {"minibatches": 2, "epochs": 2, "importance_cap": 1.1},
                              "grpo": {"kl_coef": 0.3, "entropy_coef": 0.1, "clip_high": 0.3, "dual_clip": 1.4, "overlong_buffer": 4}}),
}


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("loss", AVERAGES)
def test_grpo_from_rewards_to_the_gradient(loss, extra, dp):
    raw = merged(RAW, EXTRAS[extra], {"stage": "grpo", "grpo": {"loss": loss}}, {"train": {"global_batch": 6}} if dp == 2 else {})
    if loss == "cispo" and extra == "all":
        raw = merged(raw, {"grpo": {"dual_clip": 0.0}})
    answers = new_answers()
    replicas = driven(raw, answers, dp)
    stage, updates = replicas[0]
    o, rollout = stage.options, stage.run.rollout
    rewards = answer_rewards(answers, o.overlong_buffer) if rollout.reward_clip else [2 * one.scores["exact"] for one in answers]
    near([one.reward for one in answers], rewards)
    A = group_advantages(loss, rewards)
    parts = [slice(0, 6), slice(6, 9)] if extra == "all" else [slice(0, 9)]      # minibatches: two prompts, and one
    assert len(updates) == len(parts) * rollout.epochs
    old = OLD if extra == "all" else None

    def expected(part):
        def of_table(table):
            logp, terms = table.log_softmax(1), []
            for answer, a in zip(answers[part], A[part]):
                own = policy_terms(loss, o, rollout.importance_cap, answer, [a] * answer.length, logp, old)
                terms.append([term + o.kl_coef * divergence(o.kl, logp[move] - REFERENCE[move]) - o.entropy_coef * entropy(logp, move[0])
                              for term, move in zip(own, moves(answer))])
            return averaged(terms, AVERAGES[loss])
        return of_table

    for number, part in enumerate(parts * rollout.epochs):
        metrics = compared(replicas, number, MOVED, expected(part))
        logp, tokens = MOVED.log_softmax(1), [move for answer in answers[part] for move in moves(answer)]
        if o.kl_coef:
            near(metrics["kl/reference"], mean([float(divergence("k3", logp[move] - REFERENCE[move])) for move in tokens]))
        if o.entropy_coef:
            near(metrics["entropy"], mean([float(entropy(logp, before)) for before, _ in tokens]))
        drawn, was = [x for answer in answers[part] for x in answer.logps], logp if old is None else old
        near(metrics["mismatch/k1"], mean([x - float(was[move]) for x, move in zip(drawn, tokens)]))


TRL_LOSS = {"gspo": dict(loss_type="grpo", importance_sampling_level="sequence"), "reinforce": dict(loss_type="dapo")}


@pytest.mark.parametrize("loss", [loss for loss in AVERAGES if loss not in ("rloo", "cispo")])  # which TRL averages or clips otherwise
def test_a_prepared_batch_has_the_loss_of_trls_trainer(loss):
    from trl import GRPOTrainer

    raw = merged(RAW, {"stage": "grpo", "rollout": {"micro_batch": 9, "epochs": 2},
                       "grpo": {"loss": loss, "kl_coef": 0.3, "clip": 0.15, "clip_high": 0.28, "dual_clip": 1.4}})
    replicas = driven(raw, new_answers())
    row, = replicas[0][1][0]
    table = MOVED.clone().requires_grad_()
    ours, _ = minimised(replicas, 0, table)
    mask = row["loss_mask"].double()
    stand_in = trl_self(read(table, row) * mask, epsilon_low=0.15, epsilon_high=0.28, beta=0.3, delta=1.4, max_completion_length=MAX_NEW_TOKENS,
                        **TRL_LOSS.get(loss, dict(loss_type=loss)))
    inputs = trl_inputs(mask, row["old_logps"] * mask, row["advantages"][:, 0].double(), ref_per_token_logps=row["reference_logps"] * mask)
    theirs = GRPOTrainer._compute_loss(stand_in, None, inputs)
    near(ours.detach(), theirs.detach())
    near(*(torch.autograd.grad(x, table, retain_graph=True)[0] for x in (ours, theirs)))


def test_no_unequal_group_is_no_update():
    assert driven(merged(RAW, {"stage": "grpo"}), [])[0][1] == []


# --- ppo -------------------------------------------------------------------------------------------------------------------


def whitened(columns, shifts_mean):
    """columns: a list per answer."""
    whole = np.concatenate(columns)
    scale = np.sqrt(whole.var(ddof=1) + 1e-8)
    return [(column - whole.mean()) / scale + (0 if shifts_mean else whole.mean()) for column in columns]


def ppo_targets(o, kl_coef, answers, rewards):
    """(advantages, returns, old values, divergence of each token) of each answer, float64 [its tokens]."""
    kls = [np.array([float(divergence(o.kl, OLD[move] - REFERENCE[move])) for move in moves(answer)]) for answer in answers]
    values = [np.array([float(VALUES[answer.tokens[t], t]) for t in range(answer.start - 1, len(answer.tokens) - 1)]) for answer in answers]
    tokens = [-kl_coef * kl for kl in kls]
    for column, reward in zip(tokens, rewards):
        column[-1] += reward
    if o.whiten_rewards:
        tokens = whitened(tokens, shifts_mean=False)
    advantages = []
    for r, V in zip(tokens, values):
        delta = [r[t] + o.gamma * (V[t + 1] if t + 1 < len(V) else 0.0) - V[t] for t in range(len(V))]
        advantages.append(np.array([sum((o.gamma * o.gae_lambda) ** (j - t) * delta[j] for j in range(t, len(V))) for t in range(len(V))]))
    returns = [A + V for A, V in zip(advantages, values)]
    return whitened(advantages, shifts_mean=True) if o.whiten_advantages else advantages, returns, values, kls


def value_terms(o, answer, returns, values, table):
    terms = []
    for k, (R, V_old) in enumerate(zip(returns, values)):
        t = answer.start - 1 + k
        V = table[answer.tokens[t], t]
        held = clip(V, V_old - o.value_clip, V_old + o.value_clip) if o.value_clip else V
        terms.append(max((V - R) ** 2, (held - R) ** 2) / 2)
    return terms


PPO = {
    "plain": {},
    "k2, rewards whitened": {"ppo": {"kl": "k2", "kl_coef": 0.4, "whiten_rewards": True, "value_clip": 0.0}},
    "k3, discounted": merged(PENALTIES, {"ppo": {"kl": "k3", "kl_coef": 0.4, "gamma": 0.9, "gae_lambda": 0.7, "whiten_advantages": False}}),
    "no reference": {"ppo": {"kl_coef": 0.0, "gae_lambda": 1.0}},
    "all": merged(PENALTIES, {"rollout": {"minibatches": 2, "epochs": 2, "importance_cap": 1.1},
                              "ppo": {"kl_coef": 0.4, "kl_control": "adaptive", "kl_target": 0.3, "kl_horizon": 50.0, "entropy_coef": 0.1,
                                      "clip_high": 0.3, "dual_clip": 1.4, "gamma": 0.95, "whiten_rewards": True}}),
}


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("options", PPO)
def test_ppo_from_rewards_to_the_gradients(options, dp):
    raw = merged(RAW, PPO[options], {"stage": "ppo"}, {"train": {"global_batch": 6}} if dp == 2 else {})
    answers = new_answers()
    replicas = driven(raw, answers, dp, {"kl_coef": 0.7} if options == "all" else None)
    stage, updates = replicas[0]
    o, rollout = stage.options, stage.run.rollout
    kl_coef = 0.7 if options == "all" else o.kl_coef                             # of a run that is resumed
    rewards = answer_rewards(answers) if rollout.reward_clip else [2 * one.scores["exact"] for one in answers]
    near([one.reward for one in answers], rewards)
    advantages, returns, values, kls = ppo_targets(o, kl_coef, answers, rewards)
    parts = [slice(0, 6), slice(6, 9)] if options == "all" else [slice(0, 9)]
    assert len(updates) == len(parts) * rollout.epochs

    def policy(part):
        def of_table(table):
            logp = table.log_softmax(1)
            return averaged([[term - o.entropy_coef * entropy(logp, move[0]) for term, move in zip(
                policy_terms("ppo", o, rollout.importance_cap, answer, A, logp, OLD), moves(answer))]
                for answer, A in zip(answers[part], advantages[part])], "tokens")
        return of_table

    def critic(part):
        whole = list(zip(answers[part], returns[part], values[part]))
        return lambda table: averaged([value_terms(o, answer, R, V, table) for answer, R, V in whole], "tokens")

    for number, part in enumerate(parts * rollout.epochs):
        compared(replicas, number, MOVED, policy(part))
        metrics = compared(replicas, number, MOVED_VALUES, critic(part), "critic")
        near(metrics["return"], np.concatenate(returns[part]).mean())
    of_answer = np.mean([kl.sum() for kl in kls]) if o.kl_coef else 0.0
    for stage, _ in replicas:
        near([stage.report()["kl/answer"], stage.report()["kl_coef"]], [of_answer, kl_coef])
        moved = 1 + np.clip(of_answer / o.kl_target - 1, -0.2, 0.2) * len(answers) / o.kl_horizon if o.kl_control == "adaptive" else 1
        near(stage.state()["kl_coef"], kl_coef * moved)


# --- online_dpo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("loss", ["dpo", "rpo_squared"])
def test_online_dpo_from_rewards_to_the_gradient(loss, dp):
    """Three prompts, one of which has equal answers and makes no pair: two pairs in a micro-batch of three, or on a replica beside one that
    has nothing that counts."""
    raw = merged(RAW, {"stage": "online_dpo", "dpo": {"loss": loss, "beta": 0.3, "nll_weight": 0.2}, "train": {"global_batch": 3 * dp},
                       "rollout": {"micro_batch": 6}})
    answers = new_answers()
    for answer in answers[3:6]:
        answer.scores["exact"] = 0.5
    replicas = driven(raw, answers, dp)
    pairs = [(answers[0], answers[2]), (answers[6], answers[7])]
    margins = [3.0, 1.5]
    assert [len(updates) for _, updates in replicas] == [1] * dp
    assert replicas[0][0].report()["pairs"] == 2 and replicas[0][0].report()["reward/margin"] == np.mean(margins)

    def expected(table):
        logp = table.log_softmax(1)
        log_ratio = lambda answer: sum(logp[move] - REFERENCE[move] for move in moves(answer))  # noqa: E731
        D = [log_ratio(best) - log_ratio(worst) for best, worst in pairs]
        terms = [-torch.log(torch.sigmoid(0.3 * d)) if loss == "dpo" else (0.3 * d - margin) ** 2 for d, margin in zip(D, margins)]
        return mean(terms) + 0.2 * mean([-logp[move] for best, _ in pairs for move in moves(best)])

    metrics = compared(replicas, 0, MOVED, expected)
    near(metrics["rewards/margin"], metrics["rewards/chosen"] - metrics["rewards/rejected"])


def test_no_pair_is_no_update():
    answers = new_answers()
    for answer in answers:
        answer.scores["exact"] = 0.5
    replicas = driven(merged(RAW, {"stage": "online_dpo"}), answers)
    assert replicas[0][1] == [] and replicas[0][0].report()["pairs"] == 0


# --- drawing -----------------------------------------------------------------------------------------------------------------


class Speaker:
    """A policy that notes what it is asked, and says that the first answer to a prompt is longer than the others."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling, keys, decode, batch):
        self.asked.append((sampling, keys))
        return [Generated([65] * (1 + (k % 3 == 0)), [-1.0] * (1 + (k % 3 == 0)), "length") for k in range(len(prompts))]

    def gathered(self, act):
        return act()


def test_no_two_answers_share_their_random_numbers(tmp_path):
    """Nor do those to a prompt that is read again in a later epoch, nor those of validation."""
    from engine.config import validate
    from engine.stages import build_stage

    stage = build_stage("grpo")
    run = stage.configure(validate(merged(RAW, {"stage": "grpo", "rollout": {"eval_temperature": 0.7}, "data": {"cache_dir": str(tmp_path)}}), 1))
    prompts = SimpleNamespace(text=str, record=lambda number: {"answer": "AA"})
    stage.begin(run, None, [prompts])
    policy = Speaker()

    def batch(numbers):
        n = len(numbers)
        return [{"number": torch.tensor(numbers), "dataset": torch.zeros(n, dtype=torch.long), "tokens": torch.tensor([[7, 8, 0]] * n),
                 "lengths": torch.full((n,), 2)}]

    first = stage.answers(batch([2, 0]) + batch([1]), {"policy": policy})
    stage.answers(batch([3, 4, 5]), {"policy": policy})              # the same prompts in the next epoch
    stage.measure(batch([0, 1, 2]), {"policy": policy})
    (training, one), (_, two), (validation, three) = policy.asked
    assert len({*one, *two}) == 18 and validation.seed != training.seed and len(set(three)) == 3
    assert (training.temperature, validation.temperature) == (1.0, 0.7)
    told = [(answer.number, answer.length, answer.reward) for answer in first]
    assert told == [(number, *one) for number in range(3) for one in ((2, 2.0), (1, 0.0), (1, 0.0))]
    assert all(answer.tokens[:2] == [7, 8] and answer.start == 2 for answer in first)


def test_dynamic_sampling_keeps_no_more_groups_than_the_batch_has():
    stage, first, more = placed(merged(RAW, {"stage": "grpo", "grpo": {"dynamic_sampling": True}}), 0, 1), new_answers(), new_answers()
    for k, answer in enumerate(first + more):
        answer.reward = 1.0 if 3 <= k < 6 else answer.scores["exact"]
    stage.answers = lambda batch, models: more
    kept, told = stage.completed(first, iter([None]), {})
    assert [id(answer) for answer in kept] == [id(answer) for answer in first[:3] + first[6:] + more[:3]]
    assert told == {"rounds": 2, "groups_kept": 1.0}


def test_what_ends_an_answer_is_not_in_its_text():
    from engine.stages.online import _said

    def text(tokens):
        sampling = Sampling(8, stop_tokens=(90,), stop_texts=("C", "B"))
        return _said(Generated(tokens, [0.0] * len(tokens), "stop"), sampling, lambda ids: bytes(ids).decode())

    assert [text(tokens) for tokens in ([65, 90], [65, 66, 67], [65, 65], [90], [90, 65])] == ["A", "A", "AA", "", "ZA"]


@pytest.mark.parametrize("dp", [1, 2])
def test_a_reward_model_judges_the_last_token(dp):
    answers = new_answers()
    raw = merged(RAW, {"stage": "grpo"}, {"train": {"global_batch": 6}} if dp == 2 else {})
    for found in on_replicas(list(range(dp)), lambda rank, total: placed(raw, rank, dp).values(Network(VALUES, total), answers)):
        near(found, [float(VALUES[answer.tokens[-1], len(answer.tokens) - 1]) for answer in answers])


# --- several updates in a step -------------------------------------------------------------------------------------------------


def test_a_step_reports_what_all_its_updates_found():
    from engine.step_record import Updates

    updates, batch = Updates({"policy": None, "critic": None}), [{"tokens": torch.zeros(2, 8)}] * 3
    for sums, norm in (({"loss": (6.0, 2.0)}, 1.0), ({"loss": (1.0, 3.0)}, None), ({"loss": (2.0, 1.0)}, 4.0)):
        updates.add("policy", batch, SimpleNamespace(sums=sums), norm)
    updates.add("critic", batch, SimpleNamespace(sums={"loss": (3.0, 4.0)}), 5.0)
    assert updates.means("policy") == {"loss": 9 / 6} and updates.means("critic") == {"loss": 3 / 4}
    assert updates.norm("policy") == 2.5 and updates.norm("critic") == 5.0 and updates.shapes == [(6, 8)] * 3


def test_clipped_counts_what_the_objective_holds_back():
    """The ratios 1.5, 1.5, 1, 0.5 and 0.5: ppo's clip depends on the sign of the advantage, cispo holds the weight on both sides."""
    from engine.online_sections import Grpo, Rollout
    from engine.stages.policy_gradient import policy_loss

    rho, ones = torch.tensor([[1.5, 1.5, 1.0, 0.5, 0.5]]), torch.ones(1, 5)
    batch = {"loss_mask": ones, "weights": torch.ones(1), "advantages": torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]]), "rollout_logps": 0 * ones,
             "old_logps": 0 * ones}
    for objective, held in (("grpo", 2), ("cispo", 4)):
        found = policy_loss(Grpo(), Rollout(max_new_tokens=5), objective, rho.log(), batch, "tokens")
        assert found.metrics["clipped"] == (held, 5)


# --- what is refused -----------------------------------------------------------------------------------------------------------

MODEL = [{"kind": "model"}]


@pytest.mark.parametrize("stage, changes, sentence", [
    ("grpo", {"rewards": []}, "`rewards` is empty"),
    ("grpo", {"rewards": [*MODEL, {"kind": "model", "name": "two"}]}, "one part of kind model is all"),
    ("grpo", {"rewards": MODEL}, "needs the reward model's checkpoint in checkpoint.roles.reward"),
    ("ppo", {"rewards": MODEL, "checkpoint": {"roles": {"reward": "nowhere"}}}, "checkpoint.roles.reward=nowhere holds no complete checkpoint"),
    ("grpo", {"checkpoint": {"roles": {"reward": "nowhere"}}}, "no part of `rewards` is of kind model"),
    ("grpo", {"rollout": {"samples_per_prompt": 1}}, r"samples_per_prompt\(1\).* set it to 2 or more"),
    ("online_dpo", {"rollout": {"samples_per_prompt": 1}}, r"samples_per_prompt\(1\).* set it to 2 or more"),
    ("grpo", {"rollout": {"minibatches": 4}}, r"minibatches\(4\) is more than .* train.global_batch\(3\)"),
    ("grpo", {"grpo": {"overlong_buffer": 7}}, r"overlong_buffer\(7\) is more than rollout.max_new_tokens\(6\)"),
    ("grpo", {"grpo": {"kl": "k1", "kl_coef": 0.1}}, "kl=k1 has a gradient of mean 0"),
    ("grpo", {"grpo": {"loss": "cispo", "dual_clip": 3.0}}, r"dual_clip\(3.0\) is not read by grpo.loss=cispo"),
    ("grpo", {"grpo": {"dual_clip": 1.0}}, r"grpo.dual_clip\(1.0\) .* set it above 1"),
    ("ppo", {"ppo": {"dual_clip": 0.5}}, r"ppo.dual_clip\(0.5\) .* set it above 1"),
    ("grpo", {"grpo": {"loss": "reinforce", "dynamic_sampling": True}}, "loss=reinforce compares with the whole batch"),
    ("ppo", {"ppo": {"critic_warmup": 4}}, r"critic_warmup\(4\) leaves the policy none of train.steps\(4\)"),
    ("ppo", {"ppo": {"kl_control": "adaptive", "kl_coef": 0.0}}, "kl_control=adaptive multiplies ppo.kl_coef, which is 0"),
    ("ppo", {"ppo": {"kl_control": "adaptive", "kl_horizon": 1.5}}, r"kl_horizon\(1.5\) lets one step of 9 answers .* below 0"),
    ("online_dpo", {"dpo": {"loss": "kto"}}, "loss=kto learns from single answers"),
    ("online_dpo", {"dpo": {"reference": "stored"}}, "set dpo.reference=role"),
    ("online_dpo", {"rollout": {"importance_cap": 2.0}}, r"importance_cap\(2\) is not read by stage=online_dpo"),
    ("online_dpo", {"rollout": {"micro_batch": 3}}, r"micro_batch\(3\) would part the two answers of a pair"),
])
def test_what_does_not_go_together_is_refused(stage, changes, sentence):
    from engine.config import ConfigError, validate
    from engine.stages import build_stage

    with pytest.raises(ConfigError, match=sentence):
        build_stage(stage).configure(validate(merged(RAW, {"stage": stage}, changes), 1))

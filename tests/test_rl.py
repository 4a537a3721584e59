"""The maths of RL against others': TRL's trainers' own loss code, and float64 loops written from the papers' formulas.

TRL's methods are called as they are, on a stand-in for `self` that hands out the same log-probabilities. That signs are right is shown apart
from any formula: one plain gradient step on a tiny softmax policy must make the better answer more probable.
"""

import itertools
import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from engine import rl
from engine.online_sections import Grpo, Ppo

pytestmark = pytest.mark.filterwarnings("ignore:.*(TRL|trl|deprecated).*")
LOSSES = list(rl.OBJECTIVES)
MASK = torch.tensor([            # ragged, of several turns, beginning at once, one token, none
    [0, 0, 1, 1, 1, 1, 0, 0, 0],
    [0, 1, 1, 0, 0, 1, 1, 1, 0],
    [1, 0, 0, 1, 0, 0, 0, 1, 1],
    [1, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0],
], dtype=torch.float64)
FULL_ROWS = MASK[:4]             # TRL counts rows without tokens as sequences
SHAPE = MASK.shape


def numbers(*shape, seed=0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)


def equal(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-11, atol=1e-12)


def alone(sums):
    """`total` of a run with one replica."""
    return sums


def on_replicas(parts, function):
    """function(part, total) of each part at once, `total` adding up what all of them hand in, as Model.total does."""
    barrier, handed, found = threading.Barrier(len(parts), timeout=30), {}, {}

    def work(i):
        def total(x):
            handed[i] = x
            barrier.wait()
            whole = sum(handed[j] for j in range(len(parts)))
            barrier.wait()
            return whole

        found[i] = function(parts[i], total)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(len(parts))]


def test_names_are_those_of_the_configuration():
    choices = {name: set(get_args(Grpo.model_fields[name].annotation)) for name in ("loss", "advantage", "average", "kl")}
    assert set(rl.OBJECTIVES) == choices["loss"]
    for advantage in choices["advantage"] - {"auto"}:
        assert rl.advantages(advantage, torch.zeros(2), torch.zeros(2, dtype=torch.long), alone).tolist() == [0, 0]
    for average in choices["average"] - {"auto"}:
        assert rl.token_count(MASK, average, 7) > 0
    for kind in choices["kl"] | set(get_args(Ppo.model_fields["kl"].annotation)):
        assert rl.kl_estimate(torch.zeros(1), kind) == 0
    assert all(advantage in choices["advantage"] and average in choices["average"] for advantage, average in rl.OBJECTIVES.values())
    for function, *args in (rl.kl_estimate, MASK, "k4"), (rl.token_count, MASK, "mean"), (rl.advantages, "best", MASK[0], MASK[0], alone):
        with pytest.raises(ValueError, match="is none of"):
            function(*args)


# --- divergence -------------------------------------------------------------------------------------------------------


def two_policies():
    """Logits of p, with a gradient, and log p, log q of 6 actions."""
    z = numbers(6, seed=1).requires_grad_()
    return z, z.log_softmax(0), numbers(6, seed=2).log_softmax(0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimates_have_the_mean_of_the_divergence(kind):
    """The sum over all actions is the exact mean over draws."""
    _, p, q = two_policies()
    equal((p.exp() * rl.kl_estimate(p - q, kind)).sum().detach(), (p.exp() * (p - q)).sum().detach())


@pytest.mark.parametrize("kind, divergence", [
    ("k1", lambda p, q: 0 * p), ("k2", lambda p, q: p.exp() * (p - q)), ("k3", lambda p, q: q.exp() * (q - p)),
], ids=["k1", "k2", "k3"])
def test_mean_gradients_of_estimates(kind, divergence):
    """As a term of the loss, where the draws do not follow the gradient: nothing, that of KL(p || q), that of KL(q || p)."""
    z, p, q = two_policies()
    ours, = torch.autograd.grad((p.detach().exp() * rl.kl_estimate(p - q, kind)).sum(), z, retain_graph=True)
    equal(ours, torch.autograd.grad(divergence(p, q).sum(), z)[0])


def test_estimates_one_by_one():
    D = numbers(40, scale=3.0)
    equal(rl.kl_estimate(D, "k1"), D)
    equal(rl.kl_estimate(D, "k2"), [d * d / 2 for d in D.tolist()])
    equal(rl.kl_estimate(D, "k3"), [np.exp(-d) - 1 + d for d in D.tolist()])
    small = torch.tensor([1e-4, -1e-4])                     # exp(-D) - 1 + D in fp32 has no right digit here
    torch.testing.assert_close(rl.kl_estimate(small, "k3"), small**2 / 2, rtol=1e-2, atol=0)


def test_adaptive_coefficient():
    """Above the target it grows, by 20% of the share of the horizon at most; below it falls likewise."""
    update = rl.updated_kl_coef
    equal([update(0.1, kl, 6.0, 1000.0, 50) for kl in (6.6, 60.0, 5.4, 0.0)], [0.1 * 1.005, 0.1 * 1.01, 0.1 * 0.995, 0.1 * 0.99])


def test_mismatch():
    logp, rollout = numbers(*SHAPE), numbers(*SHAPE, seed=1)
    found, k1, k3, largest = rl.mismatch(logp, rollout, MASK), 0.0, 0.0, 0.0
    for i, t in np.ndindex(*SHAPE):
        if MASK[i, t]:
            D = float(rollout[i, t] - logp[i, t])
            k1, k3, largest = k1 + D, k3 + np.exp(-D) - 1 + D, max(largest, abs(D))
    equal([found["k1"], found["k3"], found["max"]], [k1, k3, largest])


# --- rewards and advantages -------------------------------------------------------------------------------------------


def test_token_rewards():
    scores, kl, beta = numbers(len(MASK)), numbers(*SHAPE, seed=1), 0.3
    expected = np.zeros(SHAPE)
    for i in range(len(MASK)):
        actions = [t for t in range(SHAPE[1]) if MASK[i, t]]
        for t in actions:
            expected[i, t] = -beta * kl[i, t]
        if actions:
            expected[i, actions[-1]] += scores[i]
    equal(rl.token_rewards(scores, kl, MASK, beta), expected)


@pytest.mark.parametrize("buffer, penalty", [(20, 1.0), (50, 0.5)])
def test_overlong_penalty_equals_trls(buffer, penalty):
    from trl.rewards import get_soft_overlong_punishment

    lengths = torch.arange(1, 101)
    theirs = get_soft_overlong_punishment(100, buffer)([[0] * n for n in lengths])
    np.testing.assert_allclose(rl.overlong_penalty(lengths, 100, buffer, penalty), np.array(theirs) * penalty, atol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_gae(gamma, lam):
    """Each answer's tokens taken out of their row, and the sum of discounted errors written out."""
    rewards, values = numbers(*SHAPE), numbers(*SHAPE, seed=1)
    A, R = np.zeros(SHAPE), np.zeros(SHAPE)
    for i in range(len(MASK)):
        actions = [t for t in range(SHAPE[1]) if MASK[i, t]]
        r, V = [float(rewards[i, t]) for t in actions], [float(values[i, t]) for t in actions] + [0.0]
        delta = [r[k] + gamma * V[k + 1] - V[k] for k in range(len(actions))]
        for k, t in enumerate(actions):
            A[i, t] = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(actions)))
            R[i, t] = A[i, t] + V[k]
    for ours, theirs in zip(rl.gae(rewards, values, MASK, gamma, lam), (A, R)):
        equal(ours, theirs)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_over_replicas(shift_mean):
    x = numbers(*SHAPE, scale=3.0) + 2
    picked = [float(v) for v, m in zip(x.flatten(), MASK.flatten()) if m]
    mean, var = np.mean(picked), np.var(picked, ddof=1)
    expected = np.where(MASK > 0, (x - mean) / np.sqrt(var + 1e-8) + (0 if shift_mean else mean), 0)
    equal(rl.whiten(x, MASK, alone, shift_mean), expected)
    parts = on_replicas([(x[:2], MASK[:2]), (x[2:], MASK[2:])], lambda part, total: rl.whiten(*part, total, shift_mean))
    equal(torch.cat(parts), expected)


def test_whiten_keeps_its_digits_beside_a_large_mean():
    """mean(x^2) - mean(x)^2 has no digit left here in fp32; the mean itself is no fp32 number."""
    x = (30000 + numbers(1000)).float()
    whitened = rl.whiten(x, torch.ones(1000), alone)
    exact = x.double().numpy()
    assert whitened.dtype == torch.float32
    np.testing.assert_allclose(whitened, (exact - exact.mean()) / exact.std(ddof=1), rtol=1e-5, atol=1e-6)


def test_whiten_of_nothing_and_of_one():
    assert not rl.whiten(torch.ones(3), torch.zeros(3), alone).any()
    assert not rl.whiten(torch.ones(3), torch.tensor([0.0, 1, 0]), alone).any()


GROUPS = torch.tensor([7, 2, 2, 7, 5, 7, 2, 9, 9, 7])      # of 4, 3, 1 and 2 answers, mixed


@pytest.mark.parametrize("kind", ["group", "group_mean", "leave_one_out"])
def test_group_advantages(kind):
    scores, expected = numbers(10, scale=2.0), []
    for i, group in enumerate(GROUPS.tolist()):
        R = float(scores[i])
        own = [float(s) for s, g in zip(scores, GROUPS.tolist()) if g == group]
        others = [float(s) for j, (s, g) in enumerate(zip(scores, GROUPS.tolist())) if g == group and j != i]
        if not others:
            expected.append(R / (1 + 1e-6) if kind == "group" else R)
        elif kind == "leave_one_out":
            expected.append(R - np.mean(others))
        else:
            expected.append((R - np.mean(own)) / (np.std(own, ddof=1) + 1e-6 if kind == "group" else 1))
    equal(rl.advantages(kind, scores, GROUPS, alone), expected)


def test_batch_advantages_over_replicas():
    scores = numbers(10, scale=2.0)
    expected = (scores - scores.mean()) / (scores.var() + 1e-8).sqrt()
    parts = on_replicas([scores[:3], scores[3:]], lambda part, total: rl.advantages("batch", part, torch.zeros(len(part)), total))
    equal(torch.cat(parts), expected)


@pytest.mark.parametrize("kind", ["group", "group_mean", "leave_one_out", "batch"])
def test_equal_scores_have_no_advantage(kind):
    """In fp32 the mean of seven 10.1 is another number, and their difference over 1e-6 would be a signal."""
    scores = torch.full((7,), 10.1)
    assert scores.sum() / 7 != scores[0]
    assert not rl.advantages(kind, scores, torch.zeros(7, dtype=torch.long), alone).any()


def test_uniform_groups():
    scores = torch.tensor([1.0, 0, 0, 1, 3, 1, 0, -2, -1, 1])
    assert rl.is_uniform(scores, GROUPS).tolist() == [True, True, True, True, True, True, True, False, False, True]
    assert rl.is_uniform(-scores, GROUPS).tolist() == rl.is_uniform(scores, GROUPS).tolist()


# --- losses against TRL's trainers ------------------------------------------------------------------------------------


def case(seed=0):
    """logp, with a gradient, old_logp, the reference's and the generator's [b, s], and one advantage per answer [b], of both signs."""
    old = -numbers(*FULL_ROWS.shape, seed=seed).abs() - 0.1
    logp, reference, rollout = (old + numbers(*old.shape, seed=seed + k, scale=0.5) for k in (1, 2, 3))
    A = torch.tensor([0.8, -1.2, 0.4, -0.3], dtype=torch.float64) * (1 if seed % 2 else -1)
    return [x * FULL_ROWS for x in (logp, old, reference, rollout)] + [A]


def trl_self(logp, **options):
    """What `self` must be for the trainers' _compute_loss."""
    gather = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    args = SimpleNamespace(use_bias_correction_kl=False, delta=options.pop("delta", None), steps_per_generation=1)
    defaults = dict(aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=0.0,
                    use_vllm=False, vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, max_completion_length=20,
                    _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)), model=SimpleNamespace(training=True),
                    _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None))
    return SimpleNamespace(**{**defaults, "args": args, "accelerator": gather, **options})


def trl_inputs(mask, old, A, **more):
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return dict(prompt_ids=ids[:, :1], prompt_mask=ids[:, :1], completion_ids=ids, completion_mask=mask, advantages=A, old_per_token_logps=old,
                num_items_in_batch=mask.sum(), **more)


def averaged(loss, mask, average):
    return (loss * rl.token_weights(mask, average)).sum() / rl.token_count(mask, average, 20)


TRL_LOSS = {"gspo": dict(loss_type="grpo", importance_sampling_level="sequence"), "reinforce": dict(loss_type="dapo")}
LOW, HIGH = 0.15, 0.28


EXTRAS = ("", "dual clip", "divergence", "importance weights")
CASES = [pair for pair in itertools.product(LOSSES, EXTRAS) if pair[0] != "rloo" and pair != ("cispo", "dual clip")]  # which has no bound


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss, extra", CASES)
def test_losses_equal_trls(loss, seed, extra):
    """Values and gradients by log p; the mean over tokens, sequences or a fixed length is TRL's of that loss."""
    from trl import GRPOTrainer

    logp, old, reference, rollout, A = case(seed)
    logp.requires_grad_()
    low, high = (1.0, HIGH) if loss == "cispo" else (LOW, HIGH)  # TRL clips cispo's ratio above only, at the value itself
    ours = rl.policy_loss(loss, logp, old, A[:, None], FULL_ROWS, low, high, 1.4 if extra == "dual clip" else 0.0)
    if extra == "importance weights":
        ours = ours * rl.truncated_weights(old, rollout, 1.1)
    if extra == "divergence":
        ours = ours + 0.3 * rl.kl_estimate(logp - reference, "k3")
    ours = averaged(ours, FULL_ROWS, rl.OBJECTIVES[loss][1])
    stand_in = trl_self(logp, epsilon_low=low, epsilon_high=1 + high if loss == "cispo" else high, beta=0.3 if extra == "divergence" else 0.0,
                        delta=1.4 if extra == "dual clip" else None, use_vllm=extra == "importance weights",
                        **TRL_LOSS.get(loss, dict(loss_type=loss)))
    weights = (old - rollout).exp().clamp(max=1.1)
    inputs = trl_inputs(FULL_ROWS, old, A, ref_per_token_logps=reference, importance_sampling_ratio=weights)
    theirs = GRPOTrainer._compute_loss(stand_in, None, inputs)
    equal(ours.detach(), theirs.detach())
    if (loss, extra) != ("gspo", "importance weights"):  # a token's weight stays with its own gradient here, TRL's goes to all tokens
        equal(*(torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("seed", [0, 1])
def test_rloo_equals_trls(seed):
    from trl import RLOOTrainer

    logp, old, _, _, A = case(seed)
    logp.requires_grad_()
    ours = averaged(rl.policy_loss("rloo", logp, old, A[:, None], FULL_ROWS, LOW, HIGH), FULL_ROWS, "sequences")
    inputs = trl_inputs(FULL_ROWS, old, A, old_logps=(old * FULL_ROWS).sum(1))
    theirs = RLOOTrainer._compute_loss(trl_self(logp, epsilon_low=LOW, epsilon_high=HIGH), None, inputs)
    equal(ours.detach(), theirs.detach())
    equal(*(torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("seed", [0, 1])
def test_clipped_share_equals_trls(seed):
    from trl import GRPOTrainer

    logp, old, _, _, A = case(seed)
    stand_in = trl_self(logp, loss_type="grpo", epsilon_low=LOW, epsilon_high=HIGH)
    GRPOTrainer._compute_loss(stand_in, None, trl_inputs(FULL_ROWS, old, A))
    ours = (rl.is_clipped(rl.ratio(logp, old), A[:, None], LOW, HIGH) * FULL_ROWS).sum() / FULL_ROWS.sum()
    assert 0 < ours < 1
    equal(ours, stand_in._metrics["train"]["clip_ratio/region_mean"][-1])


@pytest.mark.parametrize("dual_clip", [0.0, 1.4])
def test_clipped_policy_loss(dual_clip):
    """Each token's own advantage, as PPO has it."""
    logp, old, A = (numbers(*SHAPE, seed=k, scale=0.4) for k in range(3))
    expected = np.zeros(SHAPE)
    for place in np.ndindex(*SHAPE):
        a, rho = float(A[place]), np.exp(float(logp[place] - old[place]))
        gain = min(rho * a, min(max(rho, 1 - LOW), 1 + HIGH) * a)
        expected[place] = -(max(gain, dual_clip * a) if dual_clip and a < 0 else gain)
    equal(rl.clipped_policy_loss(logp, old, A, LOW, HIGH, dual_clip), expected)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_value_loss(clip):
    V, V_old, R = (numbers(*SHAPE, seed=k, scale=0.4) for k in range(3))
    expected = np.zeros(SHAPE)
    for place in np.ndindex(*SHAPE):
        v, old, r = float(V[place]), float(V_old[place]), float(R[place])
        held = min(max(v, old - clip), old + clip) if clip else v
        expected[place] = max((v - r) ** 2, (held - r) ** 2) / 2
    equal(rl.value_loss(V, V_old, R, clip), expected)


@pytest.mark.parametrize("average", ["sequences", "tokens", "fixed"])
def test_averages(average):
    """Over a batch in two parts, as the engine sums them; the empty row is no sequence."""
    x = numbers(*SHAPE)
    rows = [[float(v) for v, m in zip(x[i], MASK[i]) if m] for i in range(len(MASK))]
    rows = [row for row in rows if row]
    tokens = [v for row in rows for v in row]
    expected = {"sequences": np.mean([np.mean(row) for row in rows]), "tokens": np.mean(tokens), "fixed": sum(tokens) / (len(rows) * 20)}
    parts = [slice(0, 2), slice(2, 5)]
    total = sum((x[rows] * rl.token_weights(MASK[rows], average)).sum() for rows in parts)
    equal(total / sum(rl.token_count(MASK[rows], average, 20) for rows in parts), expected[average])


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_first_ratio_is_one(loss):
    logp = case()[0].float().requires_grad_()
    assert (rl.ratio_of(loss, logp, logp.detach(), FULL_ROWS.float()) == 1).all()


@pytest.mark.parametrize("name, function", {
    "clipped": lambda x, old, A: rl.clipped_policy_loss(x, old, A, LOW, HIGH, 1.4),
    "rloo": lambda x, old, A: rl.policy_loss("rloo", x, old, A, FULL_ROWS, LOW, HIGH).mean(1),
    "value": lambda x, old, A: rl.value_loss(x, old, A, 0.2),
    **{kind: lambda x, old, A, kind=kind: rl.kl_estimate(x - old, kind) for kind in ("k1", "k2", "k3")},
}.items())
def test_gradients_equal_finite_differences(name, function):
    logp, old, _, _, A = case()
    assert torch.autograd.gradcheck(lambda x: function(x, old, A[:, None]), logp.requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_gspo_has_the_gradient_of_the_sequence_ratio():
    """Finite differences of min(s A, clip(s) A) itself, which knows no stopped gradient."""
    logp, old, _, _, A = case()

    def plain(x):
        s = np.exp([(x - old).numpy()[i][FULL_ROWS[i] > 0].mean() for i in range(len(x))])
        return -np.minimum(s * A.numpy(), np.clip(s, 1 - 0.05, 1 + 0.05) * A.numpy()).mean()

    expected = np.zeros(logp.shape)
    for place in np.ndindex(*logp.shape):
        step = torch.zeros_like(logp)
        step[place] = 1e-6
        expected[place] = (plain(logp + step) - plain(logp - step)) / 2e-6
    logp.requires_grad_()
    averaged(rl.policy_loss("gspo", logp, old, A[:, None], FULL_ROWS, 0.05, 0.05), FULL_ROWS, "sequences").backward()
    np.testing.assert_allclose(logp.grad, expected, atol=1e-9)
    assert (expected[0] == 0).all() != (expected[1] == 0).all()       # one answer beyond the clip, another within


def test_cispo_does_not_differentiate_its_ratio():
    logp, old, _, _, A = case()
    logp.requires_grad_()
    rl.policy_loss("cispo", logp, old, A[:, None], FULL_ROWS, LOW, HIGH).sum().backward()
    equal(logp.grad, -np.clip(np.exp((logp - old).detach()), 1 - LOW, 1 + HIGH) * A[:, None])


def test_importance_weights_have_no_gradient():
    logp = case()[0].requires_grad_()
    assert not rl.truncated_weights(logp, logp.detach() - 1, 2.0).requires_grad
    equal(rl.truncated_weights(logp, logp.detach() - 1, 2.0), np.full(FULL_ROWS.shape, 2.0))


# --- signs ------------------------------------------------------------------------------------------------------------

ACTIONS = torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])             # answers of 2, 2, 2 and 1 tokens
DRAWN = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
SCORES = torch.tensor([1.0, -0.5, 0.5, 0.0], dtype=torch.float64)                   # action 0 is the better one
ONE_GROUP = torch.zeros(4, dtype=torch.long)


def logps_of(z):
    """log p of ACTIONS under a softmax of 3 logits, times the mask."""
    return z.log_softmax(0)[ACTIONS] * DRAWN


def learn(loss_of, size=0.05):
    """Probabilities before and after one step of plain gradient descent on the sum of loss_of(logits)."""
    z = torch.tensor([0.1, 0.3, -0.2], dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(loss_of(z).sum(), z)
    return z.detach().softmax(0), (z.detach() - size * gradient).softmax(0)


@pytest.mark.parametrize("drift", [0.0, 0.1, -0.1], ids="ratios moved by {}".format)
@pytest.mark.parametrize("advantage", ["group", "group_mean", "leave_one_out", "batch"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_prefers_the_better_answer(loss, advantage, drift):
    """Also where the policy has moved since the rollout, within the clip."""
    A = rl.advantages(advantage, SCORES, ONE_GROUP, alone)[:, None]
    weights = rl.token_weights(DRAWN, rl.OBJECTIVES[loss][1])

    def loss_of(z):
        logp = logps_of(z)
        return rl.policy_loss(loss, logp, logp.detach() - drift * DRAWN, A, DRAWN, 0.3, 0.3, 3.0) * weights

    before, after = learn(loss_of)
    assert after[0] > before[0] and after[1] < before[1]


@pytest.mark.parametrize("answer, sign", [(0, 1), (1, -1)])
@pytest.mark.parametrize("loss", LOSSES)
def test_praise_and_blame_alone(loss, answer, sign):
    """An answer with a positive advantage becomes more probable, one with a negative advantage less."""
    A = torch.zeros(4, 1, dtype=torch.float64)
    A[answer] = sign
    before, after = learn(lambda z: rl.policy_loss(loss, logps_of(z), logps_of(z).detach(), A, DRAWN, 0.2, 0.2))
    assert sign * (after[answer] - before[answer]) > 0


def ppo_advantages(scores, logp, reference, values, kl_coef):
    rewards = rl.token_rewards(scores, rl.kl_estimate(logp - reference, "k1"), DRAWN, kl_coef)
    return rl.gae(rewards, values, DRAWN, 1.0, 0.95)


def test_ppo_prefers_the_better_answer():
    def loss_of(z):
        logp = logps_of(z)
        A, _ = ppo_advantages(SCORES, logp.detach(), logp.detach(), torch.full_like(DRAWN, 0.2), 0.1)
        return rl.clipped_policy_loss(logp, logp.detach(), rl.whiten(A, DRAWN, alone), 0.2, 0.2) * DRAWN

    before, after = learn(loss_of)
    assert after[0] > before[0] and after[1] < before[1]


REFERENCE = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64).log_softmax(0)    # likes action 1, and not action 0


def test_ppo_goes_back_to_the_reference():
    """With equal scores the divergence in the reward decides."""
    def loss_of(z):
        logp = logps_of(z)
        A, _ = ppo_advantages(torch.zeros(4).double(), logp.detach(), REFERENCE[ACTIONS] * DRAWN, torch.zeros_like(DRAWN), 0.5)
        return rl.clipped_policy_loss(logp, logp.detach(), A, 0.2, 0.2) * DRAWN

    before, after = learn(loss_of)
    assert after[0] < before[0] and after[1] > before[1]


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_divergence_in_the_loss_goes_back_to_the_reference(kind):
    before, after = learn(lambda z: rl.kl_estimate(logps_of(z) - REFERENCE[ACTIONS] * DRAWN, kind))
    assert after[0] < before[0] and after[1] > before[1]


def test_better_than_foreseen_is_praised_and_foreseen():
    """A token's advantage falls as its value rises, and a step of the critic moves the value towards the return."""
    logp = logps_of(torch.zeros(3).double())
    low, high = (ppo_advantages(SCORES, logp, logp, torch.full_like(DRAWN, value), 0.0) for value in (-2.0, 2.0))
    assert ((low[0] > high[0]) | (DRAWN == 0)).all()
    for value, (_, R) in ((-2.0, low), (2.0, high)):
        V = torch.full_like(DRAWN, value).requires_grad_()
        (rl.value_loss(V, V.detach(), R, 0.2) * DRAWN).sum().backward()
        assert torch.equal(torch.sign(-V.grad), torch.sign(R - value) * DRAWN)

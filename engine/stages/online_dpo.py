"""Online DPO: answer, judge, pair the best answer to each prompt with the worst, and learn from the pairs as in dpo.

The loss, its options and the frozen reference are dpo's (section `dpo`); answers and rewards are drawn as in ppo and grpo. With
rollout.epochs and rollout.minibatches above 1 and many prompts in a step it is iterated DPO (arXiv 2312.16682), with one update per step
online DPO (arXiv 2402.04792). Prompts whose answers are all worth the same make no pair and count nowhere.
"""

import torch

from engine.stage import Loss
from engine.stages.dpo import Dpo
from engine.stages.online import Answer, Online


class WeightedDpo(Dpo):
    """dpo, where `weights` [2n] say which rows count."""

    def count(self, role, batch):
        return batch["weights"].sum() / 2

    def _chosen_tokens(self, batch):
        return (batch["loss_mask"] * batch["weights"][:, None])[self._is_chosen(batch)].sum()


class OnlineDpo(Online):
    samples_at_least = 2
    rows_alike = 2

    def configure(self, run):
        self.dpo = WeightedDpo()
        self.dpo.configure(run)
        return super().configure(run)

    def problems(self, run):
        yield from super().problems(run)
        if run.dpo.loss == "kto":
            yield "dpo.loss=kto learns from single answers, but stage=online_dpo makes pairs; take dpo.loss=dpo"
        if run.dpo.reference == "stored":
            yield "dpo.reference=stored keeps the log-probabilities of given answers, but stage=online_dpo draws new ones; set dpo.reference=role"
        if run.rollout.importance_cap:
            yield f"rollout.importance_cap({run.rollout.importance_cap:g}) is not read by stage=online_dpo, whose loss takes no ratios; leave it out"
        if run.rollout.micro_batch % 2:
            yield f"rollout.micro_batch({run.rollout.micro_batch}) would part the two answers of a pair; take an even number"

    def needs_reference(self, run):
        return self.dpo.has_reference

    @property
    def rows_at_once(self):
        return self.run.rollout.micro_batch or 2 * self.run.train.micro_batch

    def prepare(self, answers, models):
        pairs, scores = _pairs(answers, self.run.rollout.samples_per_prompt)
        self._report |= {"pairs": len(pairs) // 2, "reward/margin": float(torch.tensor(scores).mean()) if scores else float("nan")}
        if not pairs:
            return
        batch = self.batch(pairs) | {"margins": torch.tensor(scores).repeat_interleave(2)}
        parts = [[row for one in self.dpo.prepare(part, models) for row in one] for part in self.minibatches(batch, 2)]
        yield from self.updates(parts, models)

    def count(self, role, batch):
        """Pairs."""
        return self.dpo.count(role, batch)

    def loss(self, role, output, batch):
        """output: log p(label) [2n, s]. Rows that only fill the micro-batch have no part in it."""
        counts = batch["weights"] > 0
        if not counts.any():
            found = self.dpo.loss(role, output, batch)
            return Loss(sum=0 * found.sum, metrics={name: (0 * total, 0 * count) for name, (total, count) in found.metrics.items()})
        return self.dpo.loss(role, output[counts], {name: t[counts] for name, t in batch.items() if name != "asked"})  # which counts places


def _pairs(answers: list[Answer], per_prompt: int) -> tuple[list[Answer], list[float]]:
    """(the best and the worst answer to each prompt as neighbours, what their rewards differ by); without prompts where all are equal."""
    pairs, scores = [], []
    for first in range(0, len(answers), per_prompt):
        ranked = sorted(answers[first:first + per_prompt], key=lambda answer: answer.reward)
        if ranked[-1].reward > ranked[0].reward:
            pairs += [ranked[-1], ranked[0]]
            scores.append(ranked[-1].reward - ranked[0].reward)
    return pairs, scores

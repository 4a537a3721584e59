"""GRPO and its kin: several answers to each prompt, each judged against the others; no critic.

grpo, dr_grpo, dapo, gspo, cispo, reinforce (REINFORCE++) and rloo differ in three things: what a reward is compared with (advantage), what
is clipped (engine/rl.py: ratio_of), and how tokens are averaged. `grpo.loss` sets all three, and the first and the last can be set apart.
DAPO is loss=dapo with clip_high=0.28, dynamic_sampling=true and an overlong_buffer.
Left out: process rewards, and groups whose answers are at different lengths of training.
"""

import torch

from engine import rl
from engine.stages.online import Answer, Online
from engine.stages.policy_gradient import action_mask, loss_problems, policy_loss


class Grpo(Online):
    def configure(self, run):
        self.options = run.grpo
        advantage, average = rl.OBJECTIVES[run.grpo.loss]
        self.advantage = advantage if run.grpo.advantage == "auto" else run.grpo.advantage
        self.average = average if run.grpo.average == "auto" else run.grpo.average
        self.samples_at_least = 1 if self.advantage == "batch" else 2
        return super().configure(run)

    def problems(self, run):
        o = run.grpo
        yield from super().problems(run)
        yield from loss_problems("grpo", o)
        if o.overlong_buffer > run.rollout.max_new_tokens:
            yield (f"grpo.overlong_buffer({o.overlong_buffer}) is more than rollout.max_new_tokens({run.rollout.max_new_tokens}), of which it is "
                   "the last part; lower it")
        if o.kl == "k1" and o.kl_coef:
            yield "grpo.kl=k1 has a gradient of mean 0 as a term of the loss, so it would hold nothing back; take k3 or k2"
        if o.loss == "cispo" and o.dual_clip:
            yield f"grpo.dual_clip({o.dual_clip}) is not read by grpo.loss=cispo, which clips weights alone; leave it out"
        if o.dynamic_sampling and self.advantage == "batch":
            yield f"grpo.dynamic_sampling leaves out groups of equal rewards, but grpo.loss={o.loss} compares with the whole batch; turn it off"

    def needs_reference(self, run):
        return run.grpo.kl_coef > 0

    def wants_entropy(self, run):
        return run.grpo.entropy_coef > 0

    # --- which answers, and their rewards --------------------------------------------------------------------------------

    def reward(self, answer: Answer) -> float:
        reward, o = super().reward(answer), self.options
        if o.overlong_buffer:
            length = torch.tensor([answer.length])
            reward += float(rl.overlong_penalty(length, self.run.rollout.max_new_tokens, o.overlong_buffer, o.overlong_penalty))
        return reward

    def completed(self, answers, feed, models):
        """DAPO's dynamic sampling: as many groups with unequal rewards as the batch has prompts, from as many batches of prompts as it takes."""
        if not self.options.dynamic_sampling:
            return answers, {}
        wanted, found, rounds = len(answers), self._unequal(answers), 1
        while len(found) < wanted and rounds < self.options.max_rounds:
            found += self._unequal(self.answers(next(feed), models))
            rounds += 1
        return found[:wanted], {"rounds": rounds, "groups_kept": len(found[:wanted]) / wanted}

    def _unequal(self, answers: list[Answer]) -> list[Answer]:
        is_equal = rl.is_uniform(*_rewards(answers))
        return [answer for answer, equal in zip(answers, is_equal.tolist()) if not equal]

    # --- learning from them ----------------------------------------------------------------------------------------------

    def prepare(self, answers, models):
        if not answers:
            return  # dynamic sampling has found nothing to learn from
        batch = self.batch(answers)
        rewards, groups = _rewards(answers)
        batch["advantages"] = rl.advantages(self.advantage, rewards, groups, lambda x: x)[:, None].expand_as(batch["loss_mask"])
        parts = self.minibatches(batch, self.run.rollout.samples_per_prompt)
        rows = [row for part in parts for row in part]
        if self.run.rollout.epochs * len(parts) > 1:
            for row, logps in zip(rows, models["policy"].score(rows)):
                row["old_logps"] = logps
        if "reference" in models:
            for row, logps in zip(rows, models["reference"].score(rows)):
                row["reference_logps"] = logps
        yield from self.updates(parts, models)

    def count(self, role, batch):
        """Answers, tokens, or answers times max_new_tokens, as the average asks."""
        return rl.token_count(action_mask(batch), self.average, self.run.rollout.max_new_tokens)

    def loss(self, role, output, batch):
        return policy_loss(self.options, self.run.rollout, self.options.loss, output, batch, self.average, self.options.kl_coef)


def _rewards(answers: list[Answer]):
    """(rewards fp32 [n], the number of each one's prompt int64 [n])."""
    return torch.tensor([answer.reward for answer in answers]), torch.tensor([answer.number for answer in answers])

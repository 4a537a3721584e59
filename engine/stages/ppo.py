"""PPO: the policy answers, a critic says what to expect at each token, and what was better than expected becomes more probable.

Four roles on one grid of ranks: policy and critic learn, the reference and, where a part of `rewards` is of kind model, the reward model
do not. Token rewards are the answer's reward at its end, less kl_coef times the divergence from the reference at every token; advantages
are generalised (GAE). The critic starts from checkpoint.roles.critic, else from the reward model, else from checkpoint.load with a new head.
The value loss has no coefficient: the critic is a network of its own, with a learning rate of its own.
Left out: a critic that shares the policy's layers.
"""

import torch

from engine import rl
from engine.stage import Loss, Role
from engine.stages.online import Online
from engine.stages.policy_gradient import action_mask, loss_problems, policy_loss


class Ppo(Online):
    def configure(self, run):
        self.options, self.kl_coef = run.ppo, run.ppo.kl_coef
        roles = run.checkpoint.roles
        if "reward" in roles and "critic" not in roles:
            run = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"roles": {**roles, "critic": roles["reward"]}})})
        run = super().configure(run)
        self.roles = {"policy": self.roles["policy"], "critic": Role(head="scalar", lr=run.ppo.critic_lr), **self.roles}
        return run

    def problems(self, run):
        o, num_answers = run.ppo, run.train.global_batch * run.rollout.samples_per_prompt
        yield from super().problems(run)
        yield from loss_problems("ppo", o)
        if o.critic_warmup >= run.train.steps > 0:
            yield f"ppo.critic_warmup({o.critic_warmup}) leaves the policy none of train.steps({run.train.steps}); lower it"
        if o.kl_control == "adaptive" and not o.kl_coef:
            yield "ppo.kl_control=adaptive multiplies ppo.kl_coef, which is 0; give it a first value"
        if o.kl_control == "adaptive" and o.kl_horizon <= num_answers / 5:
            yield (f"ppo.kl_horizon({o.kl_horizon:g}) lets one step of {num_answers} answers (train.global_batch * rollout.samples_per_prompt) take "
                   f"kl_coef below 0; raise it well above {num_answers / 5:g}")

    def needs_reference(self, run):
        return run.ppo.kl_coef > 0

    def wants_entropy(self, run):
        return run.ppo.entropy_coef > 0

    def learns(self, role, step):
        return role == "critic" or step > self.options.critic_warmup

    def state(self):
        return {"kl_coef": self.kl_coef}

    def restore(self, state):
        super().restore(state)
        self.kl_coef = state.get("kl_coef", self.kl_coef)

    # --- from answers to advantages ----------------------------------------------------------------------------------------

    def prepare(self, answers, models):
        o = self.options
        batch = self.batch(answers)
        batch["rewards"] = torch.tensor([answer.reward for answer in answers])
        parts = self.minibatches(batch, self.run.rollout.samples_per_prompt)
        rows = [row for part in parts for row in part]
        for name, role in (("old_logps", "policy"), ("old_values", "critic"), ("reference_logps", "reference")):
            if role in models:
                for row, output in zip(rows, models[role].score(rows)):
                    row[name] = output.cpu()
        whole = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}  # of this replica
        mask, total = action_mask(whole), models["policy"].total
        on_host = lambda x: total(x).cpu()  # noqa: E731
        kl = rl.kl_estimate((whole["old_logps"] - whole["reference_logps"]) * mask, o.kl) if "reference" in models else torch.zeros_like(mask)
        rewards = rl.token_rewards(whole["rewards"], kl, mask, self.kl_coef)
        if o.whiten_rewards:
            rewards = rl.whiten(rewards, mask, on_host, shift_mean=False)
        A, R = rl.gae(rewards, whole["old_values"] * mask, mask, o.gamma, o.gae_lambda)
        if o.whiten_advantages:
            A = rl.whiten(A, mask, on_host)
        for row, a, returns in zip(rows, A.split(self.rows_at_once), R.split(self.rows_at_once)):
            row["advantages"], row["returns"] = a, returns
        self._tell(kl, mask, whole, on_host)
        yield from self.updates(parts, models, lambda: bool(o.early_stop_kl) and models["policy"].last.get("kl/update", 0.0) > o.early_stop_kl)

    def _tell(self, kl, mask, whole, total) -> None:
        """Report the divergence of an answer and what it cost, and move the coefficient where it is adaptive."""
        o = self.options
        answers, divergence = total(torch.stack([whole["weights"].sum(), (kl * mask).sum()])).tolist()
        divergence /= answers
        self._report |= {"kl/answer": divergence, "kl_coef": self.kl_coef}
        if o.kl_control == "adaptive":
            self.kl_coef = rl.updated_kl_coef(self.kl_coef, divergence, o.kl_target, o.kl_horizon, int(answers))

    # --- losses --------------------------------------------------------------------------------------------------------------

    def count(self, role, batch):
        """Tokens of the policy."""
        return action_mask(batch).sum()

    def loss(self, role, output, batch):
        """output: of the policy log p(label) [b, s] (and the entropy), of the critic values [b, s]."""
        if role == "policy":
            return policy_loss(self.options, self.run.rollout, "ppo", output, batch, "tokens")
        mask = action_mask(batch)
        num_tokens, clip = mask.sum(), self.options.value_clip
        loss = rl.value_loss(output, batch["old_values"], batch["returns"], clip) * mask
        moved = (output.detach() - batch["old_values"]).abs()
        return Loss(sum=loss.sum(), metrics={
            "value": ((output.detach() * mask).sum(), num_tokens),
            "return": ((batch["returns"] * mask).sum(), num_tokens),
            "error": (((output.detach() - batch["returns"]) ** 2 * mask).sum(), num_tokens),
            "clipped": ((((moved > clip) if clip else torch.zeros_like(moved)) * mask).sum(), num_tokens),
        })

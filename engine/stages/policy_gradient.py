"""The policy's loss and its numbers, as ppo and grpo share them: [b, s] tensors and the options of their sections.

    loss = policy_loss(options, rollout, "gspo", output, batch, average="sequences")

batch: loss_mask [b, s] and weights [b], advantages [b, s] or [b, 1], rollout_logps [b, s]; old_logps [b, s] where several updates follow a
rollout (with one they are the policy's own); reference_logps [b, s] where the loss holds a divergence from the reference.
"""

import torch

from engine import rl
from engine.stage import Loss


def loss_problems(section: str, options):
    """One sentence for each mistake in the options of the section ppo or grpo that the loss reads."""
    if 0 < options.dual_clip <= 1:
        yield (f"{section}.dual_clip({options.dual_clip}) bounds the loss where the policy has not moved yet; set it above 1 (usually 3), or to 0, "
               "which is off")


def action_mask(batch) -> torch.Tensor:
    """1 where a label is the policy's and the row counts, [b, s]."""
    return batch["loss_mask"] * batch["weights"][:, None]


def policy_loss(options, rollout, objective: str, output, batch, average: str, kl_coef: float = 0.0) -> Loss:
    """objective: a key of rl.OBJECTIVES, or ppo. output: log p(label) [b, s], or with the entropy [b, s, 2]."""
    mask = action_mask(batch)
    logp, entropy = output.unbind(-1) if output.dim() == 3 else (output, None)
    logp = logp * mask
    old = batch.get("old_logps", logp.detach()) * mask
    drawn, A = batch["rollout_logps"] * mask, batch["advantages"]
    clip_high = options.clip_high or options.clip
    loss = rl.policy_loss(objective, logp, old, A, mask, options.clip, clip_high, options.dual_clip)
    if rollout.importance_cap:
        loss = loss * rl.truncated_weights(old, drawn, rollout.importance_cap)
    rho, num_tokens = rl.ratio_of(objective, logp.detach(), old, mask), mask.sum()
    is_held = rho != rho.clamp(1 - options.clip, 1 + clip_high) if objective == "cispo" else rl.is_clipped(rho, A, options.clip, clip_high)
    moved, found = rl.mismatch(logp.detach(), old, mask), rl.mismatch(old, drawn, mask)
    metrics = {
        "policy_loss": ((loss.detach() * mask).sum(), num_tokens),
        "ratio_error": (((rho - 1).abs() * mask).sum(), num_tokens),
        "clipped": ((is_held * mask).sum(), num_tokens),
        "kl/update": (moved["k3"], num_tokens),
        "mismatch/k1": (found["k1"], num_tokens),
        "mismatch/k3": (found["k3"], num_tokens),
    }
    if kl_coef:
        kl = rl.kl_estimate(logp - batch["reference_logps"] * mask, options.kl)
        loss = loss + kl_coef * kl
    if "reference_logps" in batch:
        metrics["kl/reference"] = (rl.kl_estimate(logp.detach() - batch["reference_logps"] * mask, "k3").sum(), num_tokens)
    if entropy is not None:
        loss = loss - options.entropy_coef * entropy
        metrics["entropy"] = ((entropy.detach() * mask).sum(), num_tokens)
    return Loss(sum=(loss * rl.token_weights(mask, average)).sum(), metrics=metrics)

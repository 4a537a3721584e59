"""The sections of a configuration that belong to learning from one's own answers: drawing them, rewarding them, and what is minimised.

engine/config.py puts them into RunConfig; docs/rl.md says which stage reads which. As there: one field, one sentence, no torch.
"""

from typing import Literal

from pydantic import Field

from engine.section import Section


class Rollout(Section):
    samples_per_prompt: int = Field(1, ge=1)
    """Answers drawn for each prompt; grpo compares them with one another."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens of an answer; with its prompt it must fit train.seq_len."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this, in drawing and in every log-probability the losses see."""
    top_k: int = Field(0, ge=0)
    """Draw among this many most probable tokens; 0 among all. What is left out makes generation differ from training."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the fewest tokens whose probabilities reach this sum."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Draw among tokens at least this share as probable as the best."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Make tokens that were said before less probable; 1 is off."""
    stop: list[str] = []
    """Texts that end an answer, beside the tokenizer's end of document and the template's end of turn."""
    batch: int = Field(0, ge=0)
    """Sequences a replica decodes at once; 0 takes all of a step."""
    micro_batch: int = Field(0, ge=0)
    """Answers per rank and forward pass of training; 0 takes train.micro_batch (which counts prompts) times samples_per_prompt."""
    epochs: int = Field(1, ge=1)
    """Passes over the answers of a step."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass; their prompts are neighbours in the global batch, so no layout changes them."""
    one_step_off: bool = False
    """Draw the next step's answers before this step's updates, the order of asynchronous training; none are drawn ahead of a checkpoint."""
    importance_cap: float = Field(0.0, ge=0)
    """Weigh each token by min(p in training / p in generation, cap), which mends their mismatch on average; 0 is off."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken off the reward of an answer that did not end by itself."""
    reward_clip: float = Field(0.0, ge=0)
    """Clip rewards to +- this; 0 is off."""
    eval_temperature: float = Field(0.0, ge=0)
    """Temperature of validation; 0 takes the most probable tokens."""
    log_samples: int = Field(2, ge=0)
    """Answers of each step written to samples.jsonl in the run's folder."""
    offload_frozen: bool = False
    """Keep frozen networks in host memory while they rest (GPUs)."""


class RewardPart(Section):
    kind: Literal["model", "exact", "regex", "math", "reasoning_gym", "code", "python"]
    """Who judges: a reward model's checkpoint (checkpoint.roles.reward), a rule, unit tests in a sandbox, or a function of yours."""
    name: str = ""
    """How metrics call this part; empty takes the kind."""
    weight: float = 1.0
    """Factor in the sum of all parts."""
    pattern: str = ""
    """regex: the answer is right where this is found; exact, math, reasoning_gym: take group 1 of its last match as what was answered."""
    path: str = ""
    """python: package.module:function, found from the working folder or PYTHONPATH."""
    key: str = "answer"
    """Field of the prompt's line that holds what this part compares with."""
    seconds: float = Field(10.0, gt=0)
    """Time limit of one answer; python: of one call."""
    memory_mib: int = Field(1024, ge=32)
    """code: memory of each process that tests an answer."""
    workers: int = Field(0, ge=0)
    """code: answers tested at once; 0 takes one per core, 8 at most."""
    allow_unsandboxed: bool = False
    """code: run tests where namespaces are missing too, with limits and an own process group alone."""


class Ppo(Section):
    kl: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the divergence from the reference, per token (engine/rl.py)."""
    kl_coef: float = Field(0.05, ge=0)
    """Taken off the reward: this times the divergence; adaptive control starts with it. 0 needs no reference."""
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: move kl_coef until the divergence of an answer is kl_target (arXiv 1909.08593)."""
    kl_target: float = Field(6.0, gt=0)
    """adaptive: divergence of a whole answer, in nats."""
    kl_horizon: float = Field(10000.0, gt=0)
    """adaptive: answers over which the coefficient may change by a factor."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Decay of generalised advantage estimation (arXiv 1506.02438)."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation over the global batch."""
    whiten_advantages: bool = True
    """Give advantages mean 0 and variance 1 over the global batch."""
    clip: float = Field(0.2, gt=0)
    """The ratio's gain ends at 1 - clip and 1 + clip."""
    clip_high: float = Field(0.0, ge=0)
    """Above, at 1 + this; 0 takes clip."""
    dual_clip: float = Field(0.0, ge=0)
    """Bound of the loss for negative advantages, as a ratio above 1 (arXiv 1912.09729, usually 3); 0 is off."""
    value_clip: float = Field(0.2, ge=0)
    """Values move at most this far from those of the rollout; 0 is off."""
    entropy_coef: float = Field(0.0, ge=0)
    """Adds this times the entropy of the policy's distribution, per token."""
    early_stop_kl: float = Field(0.0, ge=0)
    """Leave out a step's remaining updates once the policy has moved this far per token (k3); 0 is off."""
    critic_lr: float = Field(0.0, ge=0)
    """Peak rate of the critic; 0 takes optim.lr."""
    critic_warmup: int = Field(0, ge=0)
    """Steps in which the critic learns alone."""


class Grpo(Section):
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce", "rloo"] = "grpo"
    """Objective, each with its paper's advantage and way to average (engine/rl.py)."""
    advantage: Literal["auto", "group", "group_mean", "leave_one_out", "batch"] = "auto"
    """Reward against: the group's mean and deviation, its mean alone, the mean of the other answers, or the global batch; auto takes the loss's own."""
    average: Literal["auto", "sequences", "tokens", "fixed"] = "auto"
    """Mean over sequences of their tokens' mean, over all tokens, or sum divided by sequences times max_new_tokens; auto takes the loss's own."""
    clip: float = Field(0.2, gt=0)
    """The ratio's gain ends at 1 - clip (gspo's paper takes 3e-4)."""
    clip_high: float = Field(0.0, ge=0)
    """Above, at 1 + this; 0 takes clip (DAPO takes 0.28)."""
    dual_clip: float = Field(0.0, ge=0)
    """Bound of the loss for negative advantages; 0 is off."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the divergence from the reference."""
    kl_coef: float = Field(0.0, ge=0)
    """Adds this times the divergence to the loss; 0 needs no reference (the paper took 0.04)."""
    entropy_coef: float = Field(0.0, ge=0)
    """Adds this times the entropy of the policy's distribution, per token."""
    dynamic_sampling: bool = False
    """DAPO: leave out groups whose rewards are all equal and draw more prompts in their place."""
    max_rounds: int = Field(8, ge=1)
    """dynamic_sampling: global batches of prompts that one step may draw; then it learns from what it has."""
    overlong_buffer: int = Field(0, ge=0)
    """DAPO: tokens before max_new_tokens in which a penalty grows; 0 is off."""
    overlong_penalty: float = Field(1.0, ge=0)
    """DAPO: penalty at max_new_tokens."""

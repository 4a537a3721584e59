"""What the stages share that learn from their own answers (ppo, grpo, online_dpo): prompts in, answers with rewards out.

    class Grpo(Online):
        def prepare(self, answers, models): ...        # the whole global batch's, the same on every rank and in the same order

A step draws a global batch of prompts, has the policy answer each rollout.samples_per_prompt times, and has the answers judged
(engine/rewards/, and the role `reward` where a part of kind model asks for it). What is drawn depends on the seed and the prompt's
sample number alone, so no layout changes it. Every rank gets all answers: statistics over groups and over the batch then need no
exchange, and `micro_batches` deals them out again.
Left out: what is learnt from them (prepare, loss), and more than one turn of the policy in one answer.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.config import ConfigError
from engine.data import conversations, prompts
from engine.data.offsets import same_tokenizer
from engine.data.pairs import filled
from engine.losses import rewards as values_at
from engine.rewards import Item, Scorer, name_of
from engine.run_folder import find
from engine.sampling import Generated, Sampling
from engine.schedule import planned_steps
from engine.stage import Role, Stage
from engine.stages import loaded


@dataclass
class Answer:
    """What the policy said to a prompt, and what it was worth."""

    number: int
    """The prompt's sample number."""
    tokens: list[int]
    """Prompt and answer."""
    start: int
    """Where the answer begins."""
    logps: list[float]
    """log p of each of its tokens, as generation computed it."""
    ended: bool
    """Did it end by itself?"""
    text: str
    scores: dict[str, float] = field(default_factory=dict)
    """By part of `rewards`."""
    reward: float = 0.0
    """The weighted sum, clipped, less penalties."""

    @property
    def length(self) -> int:
        return len(self.tokens) - self.start


class Online(Stage):
    draws_freely = True
    validates_loss = False
    samples_at_least = 1

    def configure(self, run):
        """Sets the roles that the rewards and `needs_reference` ask for. Raises ConfigError."""
        self.run = run = conversations.configured(run)
        if problems := list(self.problems(run)):
            raise ConfigError(problems)
        self.roles = {"policy": Role(temperature=run.rollout.temperature, wants_entropy=self.wants_entropy(run))}
        rests = run.rollout.offload_frozen
        if self.needs_reference(run):
            self.roles["reference"] = Role(train=False, temperature=run.rollout.temperature, rests_on_host=rests)
        if self.judge:
            self.roles["reward"] = Role(head="scalar", train=False, rests_on_host=rests)
            _refuse_other_tokenizer(run)
        self.ahead: tuple[int, list[Answer]] | None = None  # answers drawn before the updates of the step before, and in which step
        self._report: dict[str, float] = {}
        self.scorer = Scorer(run.rewards)  # last: what it starts is for `close` to end
        return run

    def problems(self, run):
        """One sentence for each mistake in what this stage reads of the configuration."""
        if not run.rewards:
            yield f"stage={run.stage} learns from rewards, but `rewards` is empty; give it a list such as [{{kind: exact}}]"
        if run.rollout.samples_per_prompt < self.samples_at_least:
            yield (f"rollout.samples_per_prompt({run.rollout.samples_per_prompt}): stage={run.stage} compares the answers to one prompt with each "
                   f"other; set it to {self.samples_at_least} or more")
        judges = [part for part in run.rewards if part.kind == "model"]
        if len(judges) > 1:
            yield "rewards: one part of kind model is all that there is a role for; mix other checkpoints through kind python"
        if run.rollout.minibatches > run.train.global_batch:
            yield (f"rollout.minibatches({run.rollout.minibatches}) is more than the prompts of a step, train.global_batch({run.train.global_batch})"
                   "; lower it")
        if judges and not run.checkpoint.roles.get("reward"):
            yield "rewards: a part of kind model needs the reward model's checkpoint in checkpoint.roles.reward"
        if not judges and "reward" in run.checkpoint.roles:
            yield "checkpoint.roles.reward is given, but no part of `rewards` is of kind model; add {kind: model}, or remove it"

    def needs_reference(self, run) -> bool:
        raise NotImplementedError

    def wants_entropy(self, run) -> bool:
        return False

    @property
    def judge(self):
        """The part of `rewards` that the role `reward` fills in, or None."""
        return next((part for part in self.run.rewards if part.kind == "model"), None)

    def datasets(self, run, num_train, num_valid):
        return prompts.datasets(run, num_train, num_valid)

    def begin(self, run, trainer, datasets):
        self.trainer, self.prompts = trainer, list(datasets)
        rollout = run.rollout
        stop = prompts.stop_tokens(run)
        self.decode = prompts.decoder(run)
        self.sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p,
                                 rollout.repetition_penalty, stop, tuple(rollout.stop), run.run.seed)
        self.validation = Sampling(rollout.max_new_tokens, rollout.eval_temperature, stop_tokens=stop, stop_texts=tuple(rollout.stop),
                                   seed=run.run.seed + 1)

    def restore(self, state):
        self.ahead = None

    def close(self):
        self.scorer.close()

    # --- drawing --------------------------------------------------------------------------------------------------------

    def draw(self, feed, models) -> list[Answer]:
        """The answers of a step, in the order of their prompts; with rollout.one_step_off those drawn before the last step's updates."""
        started = time.monotonic()
        if not self.ahead:
            self.ahead = feed.step, self.answers(next(feed), models)
        drawn_at, answers = self.ahead
        answers, found = self.completed(answers, feed, models)
        self.ahead, feed.ahead = None, 0
        if self.run.rollout.one_step_off and not self._is_saved_after(feed.step):
            self.ahead, feed.ahead = (feed.step, self.answers(next(feed), models)), 1
        self._report = {**found, **_statistics(answers), "staleness": feed.step - drawn_at, "rollout_s": time.monotonic() - started}
        self.trainer.log.samples(feed.step, [_told(answer, self.prompts[0].text(answer.number)) for answer in answers[:self.run.rollout.log_samples]])
        return answers

    def completed(self, answers, feed, models) -> tuple[list[Answer], Mapping[str, float]]:
        """What of the answers is learnt from, with more of them where needed, and what to report of that."""
        return answers, {}

    def _is_saved_after(self, step: int) -> bool:
        """Nothing is drawn ahead of a checkpoint, so that a run that resumes from it goes on as if it had never stopped."""
        every = self.run.checkpoint.save_every
        return step == planned_steps(self.run.train) or every > 0 and step % every == 0

    def answers(self, micro_batches, models, sampling: Sampling | None = None) -> list[Answer]:
        """Answers to the prompts of a global batch, of which this replica's are given: judged, those to one prompt together, in the
        order of sample numbers. Collective."""
        sampling, per_prompt = (sampling, 1) if sampling else (self.sampling, self.run.rollout.samples_per_prompt)
        asked = [(int(number), int(dataset), tokens[:length].tolist())
                 for batch in micro_batches
                 for number, dataset, tokens, length in zip(*(batch[k] for k in ("number", "dataset", "tokens", "lengths")))
                 for _ in range(per_prompt)]
        keys = [number * per_prompt + k % per_prompt for k, (number, _, _) in enumerate(asked)]
        said = models["policy"].generate([prompt for _, _, prompt in asked], sampling, keys, self.decode, batch=self.run.rollout.batch)

        def judged() -> list[Answer]:
            texts = [_said(one, sampling, self.decode) for one in said]
            items = [Item(self.prompts[dataset].text(number), text, self.prompts[dataset].record(number), one.reason == "stop")
                     for (number, dataset, _), text, one in zip(asked, texts, said)]
            return [Answer(number, prompt + one.tokens, len(prompt), one.logps, one.reason == "stop", text, scores)
                    for (number, _, prompt), one, text, scores in zip(asked, said, texts, self.scorer.score(items))]

        found = sorted(models["policy"].gathered(judged), key=lambda answer: answer.number)  # stable: those to one prompt keep their order
        if self.judge:
            for answer, value in zip(found, self.values(models["reward"], found)):
                answer.scores[name_of(self.judge)] = value
        for answer in found:
            answer.reward = self.reward(answer)
        return found

    def reward(self, answer: Answer) -> float:
        """What an answer is worth, from its scores."""
        rollout = self.run.rollout
        reward = self.scorer.total(answer.scores)
        if rollout.reward_clip:
            reward = min(max(reward, -rollout.reward_clip), rollout.reward_clip)
        if not answer.ended:
            reward -= rollout.missing_eos_penalty
        return reward

    def values(self, model, answers: list[Answer]) -> list[float]:
        """The scalar head's value at the last token of each answer. Collective."""
        batch = self.batch(answers) | {"place": torch.arange(len(answers))}
        rows = self.trainer.spread(batch, self.rows_at_once)
        found = torch.zeros(2, len(answers), dtype=torch.float64)  # what this replica scored, and how often
        for output, one in zip(model.score(rows), rows):
            found[0].index_add_(0, one["place"], values_at(output.cpu(), one["ends"]).double() * one["weights"])
            found[1].index_add_(0, one["place"], one["weights"].double())
        value, times = model.total(found).cpu()
        return (value / times).tolist()

    # --- as tensors -----------------------------------------------------------------------------------------------------

    def batch(self, answers: list[Answer]) -> dict:
        """Rows of the global batch, [b, s] and [b]: tokens, labels, loss_mask (1 where the label is the policy's), position_ids, ends, and
        rollout_logps where loss_mask is 1."""
        rows = [np.asarray(answer.tokens) for answer in answers]
        seq_len = max(row.size for row in rows)
        batch = filled([(row, np.arange(row.size) >= answer.start) for row, answer in zip(rows, answers)], seq_len)
        batch["rollout_logps"] = torch.zeros(len(rows), seq_len)
        for logps, answer in zip(batch["rollout_logps"], answers):
            logps[answer.start - 1:answer.start - 1 + answer.length] = torch.tensor(answer.logps)
        return batch

    @property
    def rows_at_once(self) -> int:
        """Answers per rank and forward pass."""
        return self.run.rollout.micro_batch or self.run.train.micro_batch * self.run.rollout.samples_per_prompt

    @property
    def rows_alike(self) -> int:
        """Answers to one prompt, where a micro-batch holds whole groups of them."""
        per_prompt = self.run.rollout.samples_per_prompt
        return 1 if self.rows_at_once % per_prompt else per_prompt

    def minibatches(self, batch: dict, rows_per_prompt: int) -> list[list[dict]]:
        """This replica's micro-batches of each of rollout.minibatches parts of a global batch: neighbouring prompts, whatever the layout."""
        prompts_of_part = np.array_split(np.arange(len(batch["tokens"]) // rows_per_prompt), self.run.rollout.minibatches)
        cuts = [(part[0] * rows_per_prompt, (part[-1] + 1) * rows_per_prompt) for part in prompts_of_part if part.size]
        return [self.trainer.spread({name: t[first:last] for name, t in batch.items()}, self.rows_at_once) for first, last in cuts]

    def updates(self, parts: list[list[dict]], models, is_over=lambda: False):
        """One optimizer step on each part, rollout.epochs times, until is_over(). Reports how many, and how far the first ratio was from 1."""
        taken = 0
        for part in parts * self.run.rollout.epochs:
            yield part
            taken += 1
            if taken == 1 and "ratio_error" in models["policy"].last:
                self._report["first_ratio_error"] = models["policy"].last["ratio_error"]
            if is_over():
                break
        self._report["updates"] = taken

    # --- telling --------------------------------------------------------------------------------------------------------

    def report(self):
        return self._report

    def measure(self, micro_batches, models):
        """Of answers at rollout.eval_temperature to this replica's prompts: reward, each of its parts, tokens, and whether they ended."""
        own = {int(number) for batch in micro_batches for number in batch["number"]}
        found = [answer for answer in self.answers(micro_batches, models, self.validation) if answer.number in own]
        columns = {"reward": [answer.reward for answer in found], "answer_tokens": [answer.length for answer in found],
                   "ended": [answer.ended for answer in found],
                   **{f"reward/{name}": [answer.scores[name] for answer in found] for name in found[0].scores}}
        return {name: (torch.tensor(float(sum(column))), torch.tensor(float(len(column)))) for name, column in columns.items()}


def _statistics(answers: list[Answer]) -> dict[str, float]:
    """Means over the answers of a step, and the deviation of their rewards."""
    mean = lambda column: float(np.mean(column)) if column else float("nan")  # noqa: E731
    rewards = [answer.reward for answer in answers]
    return {"reward": mean(rewards), "reward_std": float(np.std(rewards)) if rewards else float("nan"),
            "answer_tokens": mean([answer.length for answer in answers]), "ended": mean([answer.ended for answer in answers]),
            **{f"reward/{name}": mean([answer.scores[name] for answer in answers]) for name in (answers[0].scores if answers else ())}}


def _said(one: Generated, sampling: Sampling, decode) -> str:
    """The text of an answer, without what ended it."""
    text = decode(one.tokens[:-1] if one.tokens and one.tokens[-1] in sampling.stop_tokens else one.tokens)
    return text[:min([text.find(stop) for stop in sampling.stop_texts if stop in text], default=len(text))]


def _told(answer: Answer, prompt: str) -> dict:
    """A line of samples.jsonl."""
    return {"sample": answer.number, "prompt": prompt, "answer": answer.text, "reward": answer.reward, **answer.scores, "ended": answer.ended,
            "tokens": answer.length}


def _refuse_other_tokenizer(run) -> None:
    folder = find(run.checkpoint.roles["reward"])
    if folder is None:
        raise ConfigError([f"checkpoint.roles.reward={run.checkpoint.roles['reward']} holds no complete checkpoint (iter_*/metadata.json)"])
    theirs = loaded.config(folder).data.tokenizer
    if theirs and not same_tokenizer(theirs, run.data.tokenizer):
        raise ConfigError([f"checkpoint.roles.reward={folder} was trained on the tokens of {theirs}, the policy speaks those of {run.data.tokenizer}"
                           "; its rewards would mean nothing. Train a reward model with the policy's tokenizer"])

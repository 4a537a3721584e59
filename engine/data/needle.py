"""Needle in a haystack: can a network find one sentence anywhere in a long text? (G. Kamradt 2023; Llama 3, arXiv 2407.21783 section 4.2.)

    needles = Needles(haystack, seq_len, draw, num_depths, num_samples, seed)     # a dataset of engine.stage
    result = retrieval(model, needles, micro_batch, dp_rank, dp)     # Retrieval: share found, by depth and overall

A row is held-out text with a needle planted at some depth, then the question, then the answer:

    ... The secret number of Lisbon is 48213. ... Question: What is the secret number of Lisbon? Answer: 48213

With data.tokenizer that is text; without one the city is a key of random tokens and the number a value of random tokens, and the
question is the key again. The answer alone counts in loss_mask. It is retrieved when each of its tokens is the most probable one,
that is, when greedy decoding would write it. Left out: several needles in one haystack, and answers that need reasoning.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.data.indexed import DataError
from engine.data.loader import Loader
from engine.stage import Batch, Dataset, Model

CITIES = ("Accra", "Athens", "Bergen", "Bogota", "Boston", "Cairo", "Dakar", "Delhi", "Dublin", "Geneva", "Hanoi", "Havana", "Kyiv", "Lagos",
          "Lima", "Lisbon", "London", "Lyon", "Madrid", "Manila", "Milan", "Nairobi", "Osaka", "Oslo", "Paris", "Porto", "Prague", "Quito",
          "Riga", "Rome", "Seoul", "Sofia", "Sydney", "Tokyo", "Toronto", "Tunis", "Vienna", "Warsaw", "Zagreb", "Zurich")


@dataclass(frozen=True)
class Needle:
    """Token ids: what is planted (it ends in the answer, or holds it), what is asked, and what has to follow."""

    planted: list[int]
    question: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.planted) + len(self.question) + len(self.answer)


def text_needles(tokenizer) -> Callable[[np.random.Generator], Needle]:
    """Needles of words; tokenizer: data_tools.tokenizer.Tokenizer. The number is encoded by itself, so that the planted and the
    expected tokens are the same ones."""

    def draw(random: np.random.Generator) -> Needle:
        city, number = CITIES[random.integers(len(CITIES))], tokenizer.encode(f" {random.integers(10_000, 100_000)}")
        planted = tokenizer.encode(f"\nThe secret number of {city} is") + number + tokenizer.encode(".\n")
        return Needle(planted, tokenizer.encode(f"\nQuestion: What is the secret number of {city}? Answer:"), number)

    return draw


def token_needles(vocab_size: int, num_tokens: int, eod_id: int | None = None) -> Callable[[np.random.Generator], Needle]:
    """Needles of random tokens but eod_id: a key of num_tokens tokens and a value of as many."""
    ids = np.array([i for i in range(vocab_size) if i != eod_id])

    def draw(random: np.random.Generator) -> Needle:
        key, value = (random.choice(ids, num_tokens).tolist() for _ in range(2))
        return Needle(key + value, key, value)

    return draw


class Needles:
    """A dataset of engine.stage: sample n has its needle at depth n % num_depths, of depths spread evenly from the first token (0)
    to right before the question (1).

    haystack: a dataset of next-token rows of the wanted length; sample n lies in its row n, counted round. draw: text_needles or
    token_needles. Raises DataError when a row has no room for a needle.
    """

    rows_per_sample = 1

    def __init__(self, haystack: Dataset, seq_len: int, draw: Callable[[np.random.Generator], Needle], num_depths: int, num_samples: int,
                 seed: int) -> None:
        self.haystack, self.seq_len, self.draw = haystack, seq_len, draw
        self.num_depths, self.num_samples, self.seed = num_depths, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def longest(self, sample_numbers: np.ndarray) -> int:
        return self.seq_len

    def depth(self, number: int) -> float:
        """Where sample `number` has its needle: 0 is the first token, 1 the last place before the question."""
        return (number % self.num_depths) / (self.num_depths - 1) if self.num_depths > 1 else 0.5

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """tokens, labels, position_ids int64 and loss_mask float32, [b, seq_len]; the mask is 1 where the label is of the answer."""
        text = self.haystack.batch(np.asarray(sample_numbers) % len(self.haystack))["tokens"].numpy()  # [b, seq_len]
        rows, mask = np.empty((len(text), self.seq_len + 1), dtype=np.int64), np.zeros((len(text), self.seq_len), dtype=np.float32)
        for i, number in enumerate(sample_numbers):
            needle = self.needle(number)
            rows[i], mask[i, -len(needle.answer):] = self._row(text[i], needle, self.depth(number)), 1
        return {"tokens": torch.from_numpy(rows[:, :-1].copy()), "labels": torch.from_numpy(rows[:, 1:].copy()),
                "loss_mask": torch.from_numpy(mask), "position_ids": torch.arange(self.seq_len).repeat(len(rows), 1)}

    def needle(self, number: int) -> Needle:
        """The needle of a sample, the same on every call and in every layout."""
        return self.draw(np.random.default_rng([self.seed, int(number)]))

    def _row(self, text: np.ndarray, needle: Needle, depth: float) -> np.ndarray:
        num_hay = self.seq_len + 1 - len(needle)
        if num_hay < 1:
            raise DataError(f"a needle, its question and its answer are {len(needle)} tokens, but a row has {self.seq_len + 1}; "
                            "set long_context.needle_samples=0, or lower long_context.needle_tokens")
        place = round(depth * num_hay)
        return np.concatenate([text[:place], needle.planted, text[place:num_hay], needle.question, needle.answer])


@dataclass(frozen=True)
class Retrieval:
    """Share of needles that were found: of all, and by depth (depth in percent -> share)."""

    overall: float
    by_depth: dict[int, float]


def is_retrieved(greedy: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """bool [b]: is every answer token the most probable one? greedy: bool [b, s], as of Model.greedy."""
    return (greedy | (loss_mask.to(greedy.device) == 0)).all(dim=1)


def retrieval(model: Model, needles: Needles, micro_batch: int, dp_rank: int, dp: int) -> Retrieval:
    """Ask the network for every needle. Collective; the same answer on every rank. micro_batch: rows of a forward pass."""
    stride = micro_batch * dp
    asked = Needles(needles.haystack, needles.seq_len, needles.draw, needles.num_depths,
                    math.ceil(len(needles) / stride) * stride, needles.seed)  # what fills the last pass does not count
    loader = Loader(asked, micro_batch, dp_rank, dp)
    tally = torch.zeros(needles.num_depths, 2)      # found, asked
    for first in range(0, len(asked), stride):      # one pass at a time: rows are as long as memory allows
        batches = loader.batches(first, stride)
        for numbers, batch, greedy in zip(loader.sample_numbers(first, stride), batches, model.greedy(batches)):
            for number, found in zip(numbers, is_retrieved(greedy, batch["loss_mask"]).tolist()):
                if number < len(needles):
                    tally[number % needles.num_depths] += torch.tensor([float(found), 1.0])
    found, counted = model.total(tally).cpu().unbind(1)
    by_depth = {round(100 * needles.depth(i)): (found[i] / counted[i]).item() for i in range(needles.num_depths) if counted[i]}
    return Retrieval((found.sum() / counted.sum()).item(), by_depth)


def from_run(run, haystack: Dataset) -> Needles:
    """Needles at train.seq_len as run.long_context asks for them, seeded by run.seed; in words where there is data.tokenizer."""
    wanted, data = run.long_context, run.data
    if data.tokenizer:
        from data_tools.tokenizer import load_tokenizer

        draw = text_needles(load_tokenizer(data.tokenizer))
    else:
        draw = token_needles(run.model.vocab_size, wanted.needle_tokens, data.eod_id)
    return Needles(haystack, run.train.seq_len, draw, wanted.needle_depths, wanted.needle_samples, run.run.seed)

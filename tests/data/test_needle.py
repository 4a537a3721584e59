"""Needles: where they lie, that rows are exact, that the same sample is the same needle everywhere, and what counts as found."""

import numpy as np
import pytest
import torch

from data_tools.tokenizer import ByteTokenizer
from engine.data.indexed import DataError
from engine.data.loader import Loader
from engine.data.needle import CITIES, Needle, Needles, is_retrieved, retrieval, text_needles, token_needles

HAY = 1000      # haystack tokens are numbers from here on, needles stay below


class Haystack:
    """Row n is 1000 * (n + 1), and counts upwards from there."""

    rows_per_sample = 1

    def __init__(self, seq_len, num_rows=3):
        self.seq_len, self.num_rows = seq_len, num_rows

    def __len__(self):
        return self.num_rows

    def batch(self, numbers):
        assert max(numbers) < self.num_rows
        return {"tokens": torch.tensor([[HAY * (n + 1) + i for i in range(self.seq_len)] for n in numbers])}


def fixed(random):
    return Needle(planted=[1, 2, 3, 4, 5], question=[1, 2], answer=[3, 4, 5])


def made(seq_len=40, num_depths=5, num_samples=10, draw=fixed, seed=7):
    return Needles(Haystack(seq_len), seq_len, draw, num_depths, num_samples, seed)


@pytest.mark.parametrize("number, hay_before", [(0, 0), (1, 8), (2, 16), (3, 23), (4, 31), (5, 0), (9, 31)])
def test_a_row_is_hay_needle_hay_question_answer(number, hay_before):
    """41 tokens, 10 of them the needle's: 31 of hay, cut at 0, 1/4, 1/2, 3/4 and 1 of them."""
    batch = made().batch(np.array([number]))
    row = [*batch["tokens"][0].tolist(), batch["labels"][0, -1].item()]
    hay = [HAY * (number % 3 + 1) + i for i in range(31)]
    assert row == hay[:hay_before] + [1, 2, 3, 4, 5] + hay[hay_before:] + [1, 2] + [3, 4, 5]
    assert batch["labels"][0].tolist() == row[1:]
    assert batch["loss_mask"][0].tolist() == [0] * 37 + [1] * 3
    assert batch["position_ids"][0].tolist() == list(range(40))


@pytest.mark.parametrize("seq_len", [17, 64, 129])
def test_batches_have_the_engines_shape(seq_len):
    needles = made(seq_len, draw=token_needles(60, 3))
    batch = needles.batch(np.arange(4))
    assert {name: t.dtype for name, t in batch.items()} == {
        "tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32, "position_ids": torch.int64}
    assert all(t.shape == (4, seq_len) and t.is_contiguous() for t in batch.values())
    assert needles.longest(np.arange(4)) == seq_len and len(needles) == 10


@pytest.mark.parametrize("num_depths, depths", [(1, [0.5, 0.5]), (2, [0, 1, 0]), (5, [0, 0.25, 0.5, 0.75, 1, 0])])
def test_depths_are_spread_and_come_round(num_depths, depths):
    assert [made(num_depths=num_depths).depth(i) for i in range(len(depths))] == depths


def test_a_sample_is_the_same_in_every_layout_and_another_under_another_seed():
    needles = made(draw=token_needles(60, 4), num_samples=8)
    together = needles.batch(np.arange(8))
    for dp in (1, 2, 4):
        ranks = [Loader(needles, 2, rank, dp).batches(0, 8) for rank in range(dp)]
        rows = torch.cat([rank[m]["tokens"] for m in range(len(ranks[0])) for rank in ranks])
        assert torch.equal(rows, together["tokens"])
    other = made(draw=token_needles(60, 4), num_samples=8, seed=8).batch(np.arange(8))
    assert not torch.equal(other["labels"], together["labels"])
    answers = {tuple(needles.needle(n).answer) for n in range(8)}
    assert len(answers) == 8


def test_token_needles_are_a_key_and_a_value_without_the_end_of_documents():
    draw = token_needles(vocab_size=6, num_tokens=3, eod_id=2)
    drawn = [draw(np.random.default_rng(i)) for i in range(50)]
    for needle in drawn:
        assert needle.planted == needle.question + needle.answer and len(needle.question) == len(needle.answer) == 3
    assert {token for needle in drawn for token in needle.planted} == {0, 1, 3, 4, 5}


def test_text_needles_say_the_same_number_twice():
    tokenizer = ByteTokenizer()
    drawn = [text_needles(tokenizer)(np.random.default_rng(i)) for i in range(300)]
    for needle in drawn:
        planted, question, answer = map(tokenizer.decode, (needle.planted, needle.question, needle.answer))
        city = next(city for city in CITIES if city in planted)
        assert planted == f"\nThe secret number of {city} is{answer}.\n"
        assert question == f"\nQuestion: What is the secret number of {city}? Answer:"
        assert len(answer) == 6 and 10_000 <= int(answer) <= 99_999
    assert len({tokenizer.decode(needle.answer) for needle in drawn}) > 290
    assert {city for city in CITIES for needle in drawn if city in tokenizer.decode(needle.planted)} == set(CITIES)


def test_a_row_that_is_too_short_is_told():
    made(seq_len=10).batch(np.arange(5))
    with pytest.raises(DataError, match="a needle, its question and its answer are 10 tokens, but a row has 10.*needle_samples=0"):
        made(seq_len=9).batch(np.arange(1))


# --- what counts as found ----------------------------------------------------------------------------------------------


def test_every_answer_token_has_to_be_right():
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]]).float()
    greedy = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1]]).bool()
    assert is_retrieved(greedy, mask).tolist() == [True, False, False, True]


class Reader:
    """A model that sees the last `sight` tokens before the question and copies what follows the key there."""

    def __init__(self, sight=10**6):
        self.sight, self.rows = sight, 0

    def greedy(self, micro_batches):
        return [torch.stack([self._row(tokens, labels) for tokens, labels in zip(batch["tokens"], batch["labels"])]) for batch in micro_batches]

    def _row(self, tokens, labels):
        self.rows += 1
        row, right = tokens.tolist(), torch.zeros(len(tokens), dtype=torch.bool)
        end = len(row) - 4                       # the question [1, 2] and the first two tokens of the answer stand there
        for start in range(max(0, end - self.sight), end):
            if row[start:start + 2] == [1, 2]:
                right[-3:] = torch.tensor(row[start + 2:start + 5]) == labels[-3:]
        return right

    def total(self, values):
        return values.clone()


def test_a_perfect_a_blind_and_a_short_sighted_model():
    perfect, blind, short = (retrieval(model, made(), 2, 0, 1) for model in (Reader(), Reader(0), Reader(17)))
    assert perfect.overall == 1 and perfect.by_depth == {0: 1, 25: 1, 50: 1, 75: 1, 100: 1}
    assert blind.overall == 0 and blind.by_depth == dict.fromkeys((0, 25, 50, 75, 100), 0)
    assert short.overall == pytest.approx(0.4) and short.by_depth == {0: 0, 25: 0, 50: 0, 75: 1, 100: 1}


@pytest.mark.parametrize("micro_batch, dp", [(1, 1), (4, 1), (2, 3), (3, 4)])
def test_ranks_share_the_needles_and_padding_does_not_count(micro_batch, dp):
    """10 needles do not divide by most of these; each is asked once, whatever fills the last pass."""

    class Rank(Reader):
        def total(self, values):
            tallies.append(values.clone())
            return values

    tallies = []
    for rank in range(dp):
        retrieval(Rank(17), made(), micro_batch, rank, dp)
    found, asked = torch.stack(tallies).sum(0).unbind(1)
    assert asked.tolist() == [2, 2, 2, 2, 2] and found.tolist() == [0, 0, 0, 2, 2]


def test_unasked_depths_are_left_out():
    result = retrieval(Reader(), made(num_samples=2), 1, 0, 1)
    assert result.by_depth == {0: 1, 25: 1} and result.overall == 1

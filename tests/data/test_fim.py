"""Fill in the middle: tokens kept up to the rule, masks where they were, random numbers of the sample alone, rates as asked."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import EOD, merged

from engine.config import validate
from engine.data.fim import FillMiddle
from engine.data.text import NextToken, datasets

PRE, MID, SUF = 91, 92, 93
OPTIONS = dict(prefix_id=PRE, middle_id=MID, suffix_id=SUF, eod_id=EOD, seed=5)


def rows(draw_lengths, width):
    """One row of documents with these lengths, each token of it different (from 100 on), cut at width."""
    row = []
    for length in draw_lengths:
        row += [100 + len(row) + t for t in range(length)] + [EOD]
    return np.resize(np.array([*row, *range(10_000, 10_000 + width)]), width).astype(np.int64)


def untangled(segment):
    """(kind, prefix, middle, suffix) of a changed segment, None of one that is plain text."""
    segment = segment.tolist()
    if PRE not in segment:
        return None
    assert segment[0] == PRE and segment.count(PRE) == segment.count(MID) == segment.count(SUF) == 1
    suffix_at, middle_at = segment.index(SUF), segment.index(MID)
    assert suffix_at < middle_at
    if suffix_at == 1:
        return "SPM or empty prefix", [], segment[middle_at + 1:], segment[2:middle_at]
    return "PSM", segment[1:suffix_at], segment[middle_at + 1:], segment[suffix_at + 1:middle_at]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=6), st.integers(2, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**40))
def test_segments_keep_their_tokens_up_to_the_rule(lengths, width, rate, spm_rate, number):
    text = rows(lengths, width)[None]
    (changed,) = FillMiddle(rate, spm_rate, **OPTIONS)(text, np.array([number]))
    (text,) = text
    assert np.array_equal(changed == EOD, text == EOD) and changed.shape == text.shape  # so masks and positions stay
    bounds = np.flatnonzero(np.concatenate([[True], text == EOD, [True]])) - 1
    for before, end in zip(bounds, bounds[1:]):
        was, now = text[before + 1:end], changed[before + 1:end]
        found = untangled(now)
        if found is None:
            assert np.array_equal(was, now)
            continue
        kind, prefix, middle, suffix = found
        assert Counter(now.tolist()) == Counter([*was[:-3].tolist(), PRE, MID, SUF])
        assert prefix + middle + suffix == was[:-3].tolist()  # the pieces are whole and in order: behind an SPM middle mark stand prefix and middle


def test_both_forms_are_as_in_the_paper():
    segment = np.arange(100, 113)  # the last three make room
    cuts = (0.75, 0.2)  # of 11 places: 8 and 2, in either order
    psm = FillMiddle(1, 0, **OPTIONS).transformed(segment, 0.5, *cuts).tolist()
    spm = FillMiddle(1, 1, **OPTIONS).transformed(segment, 0.5, *cuts).tolist()
    assert psm == [PRE, 100, 101, SUF, 108, 109, MID, 102, 103, 104, 105, 106, 107]
    assert spm == [PRE, SUF, 108, 109, MID, 100, 101, 102, 103, 104, 105, 106, 107]


def test_rates_are_met_and_cuts_are_uniform():
    text = np.tile(np.append(np.arange(100, 120), EOD), (4000, 1))
    changed = FillMiddle(0.7, 0.25, **OPTIONS)(text, np.arange(4000))
    is_fim = (changed == PRE).any(1)
    is_suffix_first = changed[is_fim, 1] == SUF
    empty_prefix = 1 - (17 / 18) ** 2  # of PSM: the lower of two cuts at 18 places is 0
    assert abs(is_fim.mean() - 0.7) < 3 * (0.7 * 0.3 / 4000) ** 0.5
    expected = 0.25 + 0.75 * empty_prefix
    assert abs(is_suffix_first.mean() - expected) < 3 * (expected * (1 - expected) / is_fim.sum()) ** 0.5
    middles = [20 - row.tolist().index(MID) - 1 for row in changed[is_fim] if row[1] != SUF]
    assert abs(np.mean(middles) - 17 / 3) < 0.3  # the mean distance of two uniform cuts, of those whose prefix is not empty


def test_a_sample_is_changed_alike_in_any_batch_and_otherwise_in_another():
    text = np.tile(np.append(np.arange(100, 160), EOD), (8, 1))
    fim = FillMiddle(1, 0.5, **OPTIONS)
    whole = fim(text, np.arange(50, 58))
    for i in (3, 0, 7):
        assert np.array_equal(fim(text[i:i + 1], np.array([50 + i]))[0], whole[i])
    assert len({row.tobytes() for row in whole}) == 8
    assert not np.array_equal(whole, FillMiddle(1, 0.5, **{**OPTIONS, "seed": 6})(text, np.arange(50, 58)))
    assert np.array_equal(text[0], np.append(np.arange(100, 160), EOD))  # what was given is not changed


def test_a_configuration_changes_training_and_leaves_validation(raw_run):
    fim = {"rate": 1.0, "prefix_id": 58, "middle_id": 59, "suffix_id": 60}
    plain, plain_valid = datasets(validate(raw_run), 8, 4)
    train, valid = datasets(validate(merged(raw_run, {"data": {"fim": fim}})), 8, 4)
    a, b = plain.batch(np.arange(8)), train.batch(np.arange(8))
    assert not torch.equal(a["tokens"], b["tokens"]) and all(torch.equal(a[name], b[name]) for name in ("segment_ids", "position_ids", "loss_mask"))
    assert torch.equal(b["tokens"][:, 1:], b["labels"][:, :-1])
    assert torch.equal(plain_valid["held_out"].batch(np.arange(4))["tokens"], valid["held_out"].batch(np.arange(4))["tokens"])
    _, both = datasets(validate(merged(raw_run, {"data": {"fim": {**fim, "valid": True}}})), 8, 4)
    assert (both["held_out"].batch(np.arange(4))["tokens"] == 59).any()


@pytest.mark.parametrize("width", [1, 3, 4])
def test_segments_without_room_for_the_marks_stay(width):
    text = np.arange(100, 100 + width)[None]
    changed = FillMiddle(1, 0.5, **OPTIONS)(text, np.array([0]))
    assert (changed == PRE).any() == (width > 3)


def test_ids_outside_the_vocabulary_are_told_by_the_corpus_and_not_by_the_marks(make_corpus):
    from engine.data.pretraining import GPTSamples

    samples = GPTSamples(make_corpus([23] * 60, vocab_size=11), np.arange(60), None, 16, 1, "train")
    data = NextToken(samples, eod_id=EOD, vocab_size=11, fim=FillMiddle(1, 0, **OPTIONS))
    assert (data.batch(np.arange(4))["tokens"] == MID).any()

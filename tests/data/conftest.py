"""Fixtures of the data-path tests: small random corpora, and megatron-core as the independent reference."""

import types

import numpy as np
import pytest

from engine.data.indexed import IndexedCorpus, IndexedWriter


@pytest.fixture
def make_corpus(tmp_path):
    """make_corpus(lengths, ...) writes a corpus of random tokens and opens it."""

    def make(lengths, name="corpus", seed=0, vocab_size=1000, dtype=np.uint16):
        random = np.random.default_rng(seed)
        with IndexedWriter(tmp_path / name, dtype) as writer:
            for length in lengths:
                writer.add_document(random.integers(0, vocab_size, size=int(length)))
        return IndexedCorpus(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def megatron():
    """The parts of megatron-core that the golden tests compare with."""
    from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset, helpers_cpp, indexed_dataset

    return types.SimpleNamespace(
        helpers=helpers_cpp,
        indexed=indexed_dataset,
        gpt=gpt_dataset,
        builder=blended_megatron_dataset_builder,
    )


class StubTokenizer:
    """What megatron's dataset config asks of a tokenizer; pad is an id that no corpus holds."""

    vocab_size, eod, pad = 1000, 7, -1
    unique_identifiers = {"class": "stub"}


@pytest.fixture(scope="session")
def megatron_config(megatron):
    """megatron_config(seq_len, seed, **fields) -> GPTDatasetConfig without masks."""

    def make(seq_len, seed, **fields):
        fields = {
            "reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False, "create_attention_mask": False,
        } | fields  # fmt: skip
        return megatron.gpt.GPTDatasetConfig(random_seed=seed, sequence_length=seq_len, tokenizer=StubTokenizer(), **fields)

    return make

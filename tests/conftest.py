"""Shared by all tests: a tiny corpus, a run configuration over it, and the ranks that stay up."""

import os

# Before torch and numpy make their pools: two processes with a thread for each core spend more time waiting for each other's threads than
# on these small models. torchrun sets the same for its ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from training import small_run, write_corpus  # noqa: E402


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return {"train": write_corpus(folder / "train"), "valid": write_corpus(folder / "valid", 20, seed=1)}


@pytest.fixture
def raw_run(corpus, tmp_path):
    return small_run(corpus, tmp_path)


def pytest_sessionfinish(session, exitstatus):
    import sys

    if "ranks" in sys.modules:
        sys.modules["ranks"].shutdown()

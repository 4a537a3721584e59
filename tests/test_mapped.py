"""engine/mapped.py: bytes of a file as tensors and back, in the sizes that are mapped and those that are read."""

import os

import pytest
import torch

from engine.mapped import SMALL, bytes_of, mapped, write_all


@pytest.fixture(params=[3, SMALL], ids=["read", "mapped"])
def stored(request, tmp_path):
    """A file whose numbers begin where no page and no number does, and those numbers."""
    values = torch.randn(request.param, 2).bfloat16()
    path = tmp_path / "file"
    path.write_bytes(b"x" * 13 + bytes(bytes_of(values)) + b"rest")
    return path, values


def test_a_tensor_is_what_lies_in_the_file(stored):
    path, values = stored
    found = mapped(path, 13, torch.bfloat16, tuple(values.shape))
    assert torch.equal(found, values)
    path.unlink()
    assert torch.equal(found, values)      # a mapping outlives the name


def test_writing_into_it_changes_no_file(stored):
    path, values = stored
    before = path.read_bytes()
    found = mapped(path, 13 - 13 % 8, torch.uint8, (values.nbytes,))
    found.zero_()
    assert not found.any() and path.read_bytes() == before


def test_a_file_that_ends_too_early_is_told(stored):
    path, values = stored
    with pytest.raises(OSError, match="cut short.*file"):
        mapped(path, 13, torch.bfloat16, (len(values) + 2, 2))


def test_no_file_stays_open(stored):
    path, values = stored
    before = len(os.listdir("/proc/self/fd"))
    kept = [mapped(path, 13, torch.bfloat16, tuple(values.shape)) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and len(kept) == 20


def test_mappings_end_with_their_last_tensor(stored):
    path, values = stored
    found = mapped(path, 16, torch.uint8, (values.nbytes - 3,))
    part = found[1:].view(-1)
    del found
    is_mapped = values.nbytes >= SMALL
    assert (str(path) in open("/proc/self/maps").read()) == is_mapped
    del part
    assert str(path) not in open("/proc/self/maps").read()


def test_pieces_are_written_behind_one_another(tmp_path):
    """More of them than one call takes."""
    pieces = [bytes([i % 251]) * (i % 7) for i in range(3000)]
    with open(tmp_path / "file", "wb") as file:
        write_all(file.fileno(), [memoryview(piece) for piece in pieces], 5)
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"".join(pieces)

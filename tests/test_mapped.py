"""engine/mapped.py: bytes of a file as tensors and back, in the sizes that are mapped and those that are read."""

import errno
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


@pytest.fixture
def weights(tmp_path):
    """A file of numbers, and a mapping of some of them from a place that is no multiple of a page."""
    values = torch.randn(SMALL // 4 + 40)
    (tmp_path / "weights").write_bytes(bytes(bytes_of(values)))
    return values[8:], mapped(tmp_path / "weights", 32, torch.float32, (SMALL // 4 + 32,))


@pytest.fixture
def copies(monkeypatch):
    """The numbers of bytes that went from file to file."""
    found, real = [], os.copy_file_range

    def counting(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(os, "copy_file_range", counting)
    return found


def written(tmp_path, pieces) -> bytes:
    with open(tmp_path / "out", "wb") as file:
        write_all(file.fileno(), pieces, 3)
    return (tmp_path / "out").read_bytes()[3:]


def test_what_was_mapped_goes_from_file_to_file(tmp_path, weights, copies):
    values, found = weights
    assert written(tmp_path, [memoryview(b"head"), found, memoryview(b"tail"), found[16:].view(2, -1)]) == (
        b"head" + bytes(bytes_of(values)) + b"tail" + bytes(bytes_of(values[16:])))
    assert sum(copies) == values.nbytes + values[16:].nbytes


def changed(found, path):
    found[5] = 7


def transposed(found, path):
    return found.view(4, -1).t()


def unlinked(found, path):
    path.unlink()


def replaced(found, path):
    path.rename(path.with_name("old"))
    path.write_bytes(bytes(found.nbytes + 100))


@pytest.mark.parametrize("change", [changed, transposed, unlinked, replaced])
def test_what_the_file_does_not_hold_is_written_from_memory(tmp_path, weights, copies, change):
    _, found = weights
    result = change(found, tmp_path / "weights")
    found = found if result is None else result
    assert written(tmp_path, [found]) == bytes(bytes_of(found.clone())) and not copies


def test_a_file_system_that_declines(tmp_path, weights, monkeypatch):
    values, found = weights
    calls = iter([1000, OSError(errno.EXDEV, "declined")])

    def declining(origin, target, count, begin, offset):
        if isinstance(answer := next(calls), OSError):
            raise answer
        return os.pwrite(target, os.pread(origin, answer, begin), offset)

    monkeypatch.setattr(os, "copy_file_range", declining)
    assert written(tmp_path, [found]) == bytes(bytes_of(values))


def test_a_full_disk_is_told(tmp_path, weights, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="no space"):
        written(tmp_path, [weights[1]])

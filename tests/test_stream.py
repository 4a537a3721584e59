"""engine/mcore/stream.py: boxes of stored tensors, however they were cut and by whomever they were written."""

import pickle

import pytest
import torch


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder that torch's own writer made, and what is in it: whole, in shards of rows and of columns, transposed in memory, a scalar."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path_factory.mktemp("stored")
    tensors = {"plain": torch.randn(3, 5, 4), "transposed": torch.randn(6, 4).T, "half": torch.randn(7, 3).bfloat16(), "scalar": torch.tensor(3.5)}
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder, tensors


def metadata_of(folder):
    from engine.mcore import stream

    return stream.read_metadata(folder)


def test_what_torch_wrote_is_read_back(stored):
    from engine.mcore import stream

    folder, tensors = stored
    metadata = metadata_of(folder)
    for name, tensor in tensors.items():
        found = stream.read(folder, metadata, name, (0,) * tensor.dim(), tuple(tensor.shape))
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    for offsets, sizes in (((1, 0, 0), (1, 5, 4)), ((0, 2, 1), (3, 3, 2)), ((2, 4, 3), (1, 1, 1))):
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes))
        assert torch.equal(stream.read(folder, metadata, "plain", offsets, sizes), tensors["plain"][box])


@pytest.fixture
def written(tmp_path):
    """A folder of ours: a tensor of [2, 4, 6], each layer in two shards of columns; one in one piece; both cut out of larger memory."""
    from engine.mcore import stream, topology

    topology.start_single()
    layers = torch.randn(2, 4, 6)
    alone = torch.randn(9, 5)[2:6]
    where = {f"layer{i}": [stream.Place("layers", (2, 4, 6), (i, 0, 3 * j), (slice(0, 4), slice(3 * j, 3 * j + 3))) for j in range(2)] for i in range(2)}
    where["alone"] = [stream.Place("alone", (4, 5), (0, 0), (slice(0, 4), slice(0, 5)))]
    stream.write(tmp_path, where, [("layer0", layers[0]), ("alone", alone), ("layer1", layers[1])])
    return tmp_path, layers, alone


def test_ours_is_read_by_torch_and_by_us(written):
    import torch.distributed.checkpoint as dcp

    from engine.mcore import stream

    folder, layers, alone = written
    state = {"layers": torch.empty(2, 4, 6), "alone": torch.empty(4, 5)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert torch.equal(state["layers"], layers) and torch.equal(state["alone"], alone)
    metadata = metadata_of(folder)
    for offsets, sizes in (((0, 0, 0), (2, 4, 6)), ((1, 1, 2), (1, 2, 3)), ((0, 0, 3), (1, 4, 3))):
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes))
        assert torch.equal(stream.read(folder, metadata, "layers", offsets, sizes), layers[box])
    assert sum(path.stat().st_size for path in folder.glob("*.distcp")) < 12_000      # not all of the memory that they were cut out of


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_metadata_runs_no_code(written):
    from engine.mcore import stream

    folder, *_ = written
    (folder / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(pickle.UnpicklingError, match=r"names builtins.print, which describes no tensors"):
        stream.read_metadata(folder)


def test_a_file_outside_and_a_shard_that_is_gone_are_refused(written):
    from engine.mcore import stream

    folder, *_ = written
    metadata = metadata_of(folder)
    key, place = next(item for item in metadata.storage_data.items() if item[0].fqn == "alone")
    metadata.storage_data[key] = type(place)("../elsewhere", place.offset, place.length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="'../elsewhere' lies outside"):
        stream.read_metadata(folder)
    del metadata.state_dict_metadata["layers"].chunks[0]
    with pytest.raises(ValueError, match="lists no file for 12 numbers of layers"):
        stream.read(folder, metadata, "layers", (0, 0, 0), (1, 4, 6))


def test_a_writer_that_fails_fails_the_call(tmp_path):
    from engine.mcore import stream

    (tmp_path / "__0_0.distcp").mkdir()
    (tmp_path / "__0_1.distcp").mkdir()
    place = [stream.Place("w", (4,), (0,), (slice(0, 4),))]
    with pytest.raises(IsADirectoryError):
        stream.write(tmp_path, {f"w{i}": place for i in range(9)}, ((f"w{i}", torch.zeros(4)) for i in range(9)))
    assert not (tmp_path / ".metadata").exists()


def test_layers_of_two_dtypes_lose_nothing(tmp_path):
    """Layers share a key, which has one dtype: the wider."""
    from engine.mcore import stream, topology

    topology.start_single()
    layers = [torch.randn(4).bfloat16(), torch.randn(4)]
    where = {f"layer{i}": [stream.Place("layers", (2, 4), (i, 0), (slice(0, 4),))] for i in range(2)}
    stream.write(tmp_path, where, ((f"layer{i}", layer) for i, layer in enumerate(layers)))
    metadata = metadata_of(tmp_path)
    for i, layer in enumerate(layers):
        assert torch.equal(stream.read(tmp_path, metadata, "layers", (i, 0), (1, 4))[0], layer.float())


def test_pieces_are_stored_as_the_whole(tmp_path):
    """In one place or cut by columns; also where they differ in dtype, of which the wider counts."""
    from engine.mcore import stream, topology

    topology.start_single()
    place = lambda key, *columns: stream.Place(key, (5, 4), (0, columns[0]), (slice(0, 5), slice(*columns)))  # noqa: E731
    where = {"one": [place("one", 0, 4)], "cut": [place("cut", 0, 1), place("cut", 1, 4)], "mixed": [place("mixed", 0, 4)]}
    rows = torch.randn(2, 4), torch.randn(3, 4)
    mixed = rows[0].bfloat16(), rows[1]
    stream.write(tmp_path, where, [("one", rows), ("cut", rows), ("mixed", mixed)])
    metadata = metadata_of(tmp_path)
    read = lambda key: stream.read(tmp_path, metadata, key, (0, 0), (5, 4))  # noqa: E731
    assert torch.equal(read("one"), torch.cat(rows)) and torch.equal(read("cut"), torch.cat(rows))
    assert torch.equal(read("mixed"), torch.cat([mixed[0].float(), mixed[1]]))


def test_places_that_make_a_whole_are_one():
    """Gate and up above one another are; halves with something between them, or of two keys, are not."""
    from engine.mcore.stream import Place, _in_one

    half = lambda start, offset, key="fc1": Place(key, (3, 8, 5), (1, offset, 0), (slice(start, start + 4), slice(0, 5)))  # noqa: E731
    assert _in_one([half(0, 0), half(4, 4)]) == [Place("fc1", (3, 8, 5), (1, 0, 0), (slice(0, 8), slice(0, 5)))]
    for found in ([half(0, 4), half(4, 0)], [half(0, 0), half(4, 4, "other")], [half(0, 0), half(5, 5)]):
        assert _in_one(found) == found


def test_nothing_more_is_made_when_a_writer_has_failed(tmp_path):
    from engine.mcore import stream

    made, names = [], [f"w{i}" for i in range(50)]
    (tmp_path / "__0_0.distcp").mkdir()

    def tensors():
        for name in names:
            made.append(name)
            yield name, torch.zeros(4)

    with pytest.raises(IsADirectoryError):
        stream.write(tmp_path, {name: [stream.Place(name, (4,), (0,), (slice(0, 4),))] for name in names}, tensors(), num_threads=1)
    assert len(made) < 10


def test_every_wrong_tensor_is_named(tmp_path):
    from engine.mcore import stream

    place = lambda key: [stream.Place(key, (4,), (0,), (slice(0, 4),))]  # noqa: E731
    with pytest.raises(ValueError, match=r"a has shape \(5,\), the model wants \(4,\); missing b; unexpected c"):
        stream.write(tmp_path, {"a": place("a"), "b": place("b")}, [("a", torch.zeros(5)), ("c", torch.zeros(4))])
    assert not (tmp_path / ".metadata").exists()


def test_pickled_metadata_is_torchs_own(written):
    folder, *_ = written
    with open(folder / ".metadata", "rb") as file:
        assert type(pickle.load(file)).__module__ == "torch.distributed.checkpoint.metadata"

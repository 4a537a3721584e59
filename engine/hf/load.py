"""Open a Hugging Face folder: config.json as a dict, safetensors as a lazy mapping, both checked against each other.

    hf, tensors = open_hf("meta-llama/Llama-3.2-1B")        # nothing but headers is read
    weight = tensors["model.norm.weight"]                    # now one tensor is

Names are those transformers writes today (a family's `canonical`). What config.json says decides: a tensor too few, one too many
or one of another shape is refused before any weight is read.
Where a folder has a hashes.json (our exports do), sizes and contents are checked against it. Pickled weights (pytorch_model.bin) are refused
unless allowed, and then read by torch's loader for tensors alone, which runs no code of theirs.
Left out: downloads; the folder must lie on this machine.
"""

import json
import math
import pickle
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine import hashes
from engine.hf import family_of
from engine.hf.fields import HFError, refuse
from engine.hf.names import some
from engine.mapped import mapped

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEAD = "lm_head.weight"
SHORT = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32"}
"""dtypes as safetensors spells them."""


class Tensors(Mapping[str, Tensor]):
    """Name -> tensor over a folder's safetensors files; each access reads one tensor from disk, on the CPU."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]):
        self._places = places  # name -> (file, the tensor's name in it)
        self._open = {}

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        return self._file(path).get_tensor(stored)

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        path, stored = self._places[name]
        return tuple(self._file(path).get_slice(stored).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors spells it (F32, BF16, ...), from the file's header."""
        path, stored = self._places[name]
        return self._file(path).get_slice(stored).get_dtype()

    def num_bytes(self, name: str) -> int:
        """The size of a tensor on disk."""
        return math.prod(self.shape(name)) * next((t.itemsize for t, short in SHORT.items() if short == self.dtype(name)), 1)

    def _file(self, path: Path):
        if path not in self._open:
            self._open[path] = _open(path)
        return self._open[path]


def open_hf(folder: str | Path, drop_mtp: bool = False, allow_pickle: bool = False, check_hashes: bool = True) -> tuple[dict[str, Any], Tensors]:
    """(config.json, name -> tensor). Raises HFError for a folder that is incomplete, contradicts itself or was changed since it was written.

    drop_mtp: leave out modules that predict further tokens; config.json then says that there are none, as it does for a folder that speaks of some
    and has none, which is what transformers saves. allow_pickle: read pytorch_model.bin where there is no
    safetensors file. check_hashes: False trusts the bytes, and checks sizes alone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HFError(f"{folder} is no folder; download the model first, then name the folder that holds its config.json")
    if problems := hashes.check(folder, contents=check_hashes):
        raise HFError(f"{folder} is damaged: {'; '.join(problems)}; copy it again, or remove {hashes.NAME} to take it as it is")
    if not (folder / "config.json").is_file():
        is_ours = (folder / "metadata.json").is_file() or any(folder.glob("iter_*"))
        raise HFError(f"{folder} has no config.json: " + ("it is a checkpoint of ours; to-hf makes a Hugging Face folder of it" if is_ours else
                                                          "name the folder of a Hugging Face model, which holds one beside its safetensors"))
    hf = read_json(folder / "config.json")
    with named(folder):
        family = family_of(hf)
    places = {}
    for stored, path in _places(folder, allow_pickle).items():
        name = family.canonical(stored)
        if name in places:
            raise HFError(f"{folder} holds {name} twice, as {places[name][1]} and as {stored}")
        if name:
            places[name] = (path, stored)
    prefixes = mtp_prefixes(hf)
    if prefixes and (drop_mtp or not any(name.startswith(prefixes) for name in places)):
        hf, places = family.without_mtp(hf), {name: place for name, place in places.items() if not name.startswith(prefixes)}
    tensors = Tensors(places)
    _check_counts(folder, hf, tensors)
    with named(folder):
        shapes = family.hf_shapes(hf)
    _check(folder, tensors, shapes)
    _check_dtypes(folder, tensors)
    # A tied model may carry its output matrix all the same; then it has to be the embedding.
    if HEAD in places and HEAD not in shapes:
        if not torch.equal(tensors[HEAD], tensors[family.EMBEDDING]):
            raise HFError(f"{folder}: config.json ties the embeddings, but {HEAD} differs from {family.EMBEDDING}")
        del places[HEAD]
    return hf, tensors


@contextmanager
def named(folder: Path):
    """An HFError about a config.json says in which folder it lies."""
    try:
        yield
    except HFError as error:
        raise HFError(f"{folder}: {error}") from None


def _check_dtypes(folder: Path, tensors: Tensors) -> None:
    """Refuse numbers that are no plain weights: what a quantised folder holds means nothing without its scales."""
    strange = [f"{name} is {tensors.dtype(name)}" for name in tensors if tensors.dtype(name) not in ("F32", "BF16", "F16")]
    if strange:
        raise HFError(f"{folder}: {some(strange)}; weights are F32, BF16 or F16 here. Save a quantised model dequantised, and any other in one of these")


def _check_counts(folder: Path, hf: Mapping[str, Any], tensors: Tensors) -> None:
    """Refuse counts that no folder with these tensors can have, before lists of that length are made: a layer has a tensor or more, an expert
    a row of the router's."""
    longest = max((size for name in tensors for size in tensors.shape(name)), default=0)
    limits = {"num_hidden_layers": (len(tensors), f"{len(tensors)} tensors"), "n_layer": (len(tensors), f"{len(tensors)} tensors")}
    limits |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), (longest, f"no dim above {longest}"))
    refuse({f"{key}={hf[key]}, but its tensors make that impossible ({found})": isinstance(hf.get(key), (int, float)) and hf[key] > limit
            for key, (limit, found) in limits.items() if key in hf}, f"{folder}/config.json says")


def mtp_prefixes(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of tensors begin that belong to modules for further tokens; none in most families."""
    return getattr(family_of(hf), "mtp_prefixes", lambda _: ())(hf)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; HFError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HFError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise HFError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise HFError(f"{path} holds no JSON object")
    return content


def _places(folder: Path, allow_pickle: bool) -> dict[str, Path]:
    """Stored name -> file; a single file goes before an index, as in transformers, and safetensors before pickles."""
    for single, index in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX)) if allow_pickle else ((WEIGHTS, INDEX),):
        if (folder / single).is_file():
            return {name: folder / single for name in _open(folder / single).keys()}
        if (folder / index).is_file():
            return _sharded(folder / index, Path(single).suffix)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles and not allow_pickle:
        raise HFError(f"{folder} has only pickled weights ({some(pickles)}), a format that can carry code; convert with --allow-pickle, which reads "
                      "the tensors in it and nothing else, or save it again with transformers (save_pretrained), which writes safetensors")
    raise HFError(f"{folder} has neither {WEIGHTS} nor {INDEX}")


def _sharded(index: Path, suffix: str) -> dict[str, Path]:
    folder, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise HFError(f"{index} has no weight_map of tensor names to file names")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        # Only bare names: an index from elsewhere must not make us read other files.
        if not shard.endswith(suffix) or "/" in shard or "\\" in shard or "\0" in shard:
            raise HFError(f"{index} names the shard {shard!r}, which is no {suffix[1:]} file inside the folder")
        if not (folder / shard).is_file():
            raise HFError(f"{index} names the shard {shard}, which is missing")
        shards[shard] = set(_open(folder / shard).keys())
    for shard, names in shards.items():
        listed = {name for name, where in weight_map.items() if where == shard}
        if names != listed:
            raise HFError(f"{folder / shard} and {index.name} disagree about where {some(sorted(names ^ listed))} is")
    return {name: folder / shard for name, shard in weight_map.items()}


class Pickled:
    """A file that torch.save wrote, with safe_open's calls; the tensors stay on disk (mmap) until they are used."""

    def __init__(self, path: Path):
        try:  # those of torch before 1.6 are no archives, and are read whole
            self._tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise HFError(f"{path} is no file of tensors alone: {error}") from None
        strange = [name for name, value in self._tensors.items() if not isinstance(value, Tensor)] if isinstance(self._tensors, dict) else ["no mapping"]
        if strange:
            raise HFError(f"{path} holds other things than tensors: {some(strange)}")

    def keys(self):
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> "Pickled.Slice":
        return Pickled.Slice(self._tensors[name])

    class Slice:
        def __init__(self, tensor: Tensor):
            self._tensor = tensor

        def get_shape(self):
            return list(self._tensor.shape)

        def get_dtype(self) -> str:
            return SHORT.get(self._tensor.dtype, str(self._tensor.dtype))


class Safe:
    """A safetensors file with safe_open's calls, each of whose tensors is a mapping of its own: what safe_open gives keeps all of the file mapped."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt", device="cpu")  # checks the header and the file's length
        self.keys, self.get_slice = self._file.keys, self._file.get_slice
        self._path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header, self._base = json.loads(file.read(length)), 8 + length

    def get_tensor(self, name: str) -> Tensor:
        entry = self._header[name]
        dtype = next((t for t, short in SHORT.items() if short == entry["dtype"]), None)
        if dtype is None:
            return self._file.get_tensor(name)
        try:
            return mapped(self._path, self._base + entry["data_offsets"][0], dtype, tuple(entry["shape"]))
        except OSError as error:
            raise HFError(f"{self._path} could not be read to its end: {error}") from None


def _open(path: Path):
    if path.suffix == ".bin":
        return Pickled(path)
    try:
        return Safe(path)
    except (SafetensorError, OSError) as error:
        raise HFError(f"{path} is no readable safetensors file: {error}") from None


def _check(folder: Path, tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every difference between the files and what config.json makes of the family, in one HFError."""
    problems = []
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    unexpected = [f"{name} {list(tensors.shape(name))}" for name in tensors if name not in expected and name != HEAD]
    differing = [f"{name} is {list(tensors.shape(name))}, config.json says {list(shape)}"
                 for name, shape in expected.items() if name in tensors and tensors.shape(name) != shape]
    for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing)):
        if names:
            problems.append(f"{len(names)} tensors {label}: {some(names)}")
    if problems:
        raise HFError(f"the tensors of {folder} are not those of its config.json: " + "; ".join(problems))

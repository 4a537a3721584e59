"""What it costs to unpickle a checkpoint's metadata by an allow-list: seconds, beside plain pickle.

    python benchmarks/safe_load.py [--tensors 2000] [--shards 64]

A folder is described as a large run would leave it: that many tensors, each in that many shards, in two files per shard's rank. Nothing else is written,
since tensors are read the same way in both cases. Left out: objects in the shards, of which there is one per rank.
"""

import argparse
import pickle
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=64)
    args = parser.parse_args()
    from engine.mcore import stream

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ".metadata")
        path.write_bytes(pickle.dumps(described(args.tensors, args.shards)))
        plain, safe = [], []
        for _ in range(5):
            plain.append(seconds(lambda: pickle.loads(path.read_bytes())))
            safe.append(seconds(lambda: stream.read_metadata(path.parent)))
        print(f"{args.tensors} tensors in {args.shards} shards each, {path.stat().st_size / 1e6:.1f} MB of .metadata, best of 5")
        print(f"plain pickle {min(plain):.3f} s, by the allow-list {min(safe):.3f} s, {min(safe) / min(plain):.2f}x")
    return 0


def described(num_tensors: int, num_shards: int):
    """The Metadata of tensors [64 * shards, 1024], cut along their first dim."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

    tensors, places = {}, {}
    for number in range(num_tensors):
        name = f"optimizer.state.exp_avg.decoder.layers.{number}.mlp.linear_fc1.weight"
        offsets = [torch.Size((64 * shard, 0)) for shard in range(num_shards)]
        chunks = [ChunkStorageMetadata(offset, torch.Size((64, 1024))) for offset in offsets]
        tensors[name] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((64 * num_shards, 1024)), chunks)
        for shard, offset in enumerate(offsets):
            places[MetadataIndex(name, offset)] = _StorageInfo(f"__{shard}_{number % 2}.distcp", number << 18, 1 << 18)
    return Metadata(tensors, None, places)


def seconds(act) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())

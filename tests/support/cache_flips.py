"""Flipped bits in every file of a feature set."""

import random
from pathlib import Path

from support.caches import flip

from headrace.cache.errors import CacheError
from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.shard import USER_BLOCK_BYTES
from headrace.cache.integrity.verify import verify_bytes


def detected(directory):
    """Whether reading all rows fails (as training would), and what `verify` says. Both
    must agree.
    """
    try:
        features = open_feature_set(directory)
        features.verify_shards()
    except CacheError as error:
        return str(error), verify_bytes(directory)
    return None, verify_bytes(directory)


def flip_many(directory: Path, flips: int, seed: int) -> int:
    """Flip one bit after another, in shards (data and metadata), manifest and spec; each must be
    found and named.
    """
    generator = random.Random(seed)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for path in files:
        data = path.read_bytes()
        for count in range(flips // len(files) + 1):
            # Every bit of the first bytes of user block and HDF5 superblock, then anywhere.
            if path.suffix == ".h5" and count < 48:
                bit = count * 8 + generator.randrange(8) + (count % 2) * USER_BLOCK_BYTES * 8
            else:
                bit = generator.randrange(len(data) * 8)
            flip(path, bit)
            message, problems = detected(directory)
            where = f"{path.name} bit {bit} of {len(data) * 8}"
            assert message is not None, f"{where}: read without an error"
            assert any(not problem.is_harmless for problem in problems), (
                f"{where}: not found by verify"
            )
            assert path.name in message, f"{where}: the message does not name the file: {message}"
            assert path.name in {problem.path.name for problem in problems}
            path.write_bytes(data)
    message, problems = detected(directory)
    assert message is None
    assert problems == []
    return len(files) * (flips // len(files) + 1)

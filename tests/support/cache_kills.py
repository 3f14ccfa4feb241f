"""Extractions into a cache that are killed at random moments."""

import os
import random
import signal
import time

import numpy as np
from support.caches import given, make_spec, shard_bytes, unit_arguments, unit_name
from support.file_system_faults import start_child, wait_for

from headrace.cache.feature_set import open_feature_set
from headrace.cache.integrity.verify import verify_bytes
from headrace.cache.manifest import read_manifest
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard

SPEC = make_spec()


def extract(root, units, *, order=None, log=None):
    """What an extraction does: plan from what is listed, publish what is missing."""
    directory = create_feature_set(root, SPEC)
    listed = read_manifest(directory)
    for number in order or range(units):
        if unit_name(number) not in listed:
            if log is not None:
                os.write(log, f"{number}\n".encode())
            publish_shard(directory, **unit_arguments(SPEC, number))
    return directory


def assert_readable(directory):
    """Whatever happened, what is listed is whole; returns how many units that is."""
    if not (directory / "spec.json").exists():
        return 0
    features = open_feature_set(directory)
    units = [int(entry.unit[1:]) for entry in features.entries]
    if units:
        values, _, content = given(SPEC, units)
        assert np.array_equal(features.load(content, None), values.astype(np.float16))
    return len(units)


def kill_loop(root, units, kills, seed, longest_s):
    """Kill extractions at random moments until `kills` have died; returns (kills, units started).

    A cache that is finished is compared with the uninterrupted one, and a new one is begun.
    """
    generator = random.Random(seed)
    whole = shard_bytes(extract(root / "whole", units))
    log = os.open(root / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    died, finished = 0, 0
    acknowledged = 0
    while died < kills:
        cache = root / f"cache{finished}"
        pid = start_child(lambda cache=cache: extract(cache, units, log=log))
        time.sleep(generator.random() * longest_s)
        os.kill(pid, signal.SIGKILL)
        status = wait_for(pid)
        directory = feature_set_path(cache, SPEC)
        listed = assert_readable(directory)
        assert listed >= acknowledged
        acknowledged = listed
        if status == 0 or listed == units:
            assert shard_bytes(extract(cache, units)) == whole
            problems = verify_bytes(directory)
            assert {problem.kind for problem in problems} <= {"temporary"}
            finished, acknowledged = finished + 1, 0
        died += status == -signal.SIGKILL
    extract(root / f"cache{finished}", units)
    assert shard_bytes(feature_set_path(root / f"cache{finished}", SPEC)) == whole
    os.lseek(log, 0, os.SEEK_SET)
    with os.fdopen(log) as file:
        started = len(file.read().split())
    return died, started, (finished + 1) * units

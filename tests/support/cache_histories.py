"""Random histories of everything that can happen to a cache, against a model of what must be in
it.
"""

import random
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.caches import flip, given, make_spec, unit_arguments, unit_name
from support.file_system_faults import dying_at, in_child

from headrace.cache.errors import CacheError
from headrace.cache.feature_set import open_feature_set
from headrace.cache.integrity.repair import repair
from headrace.cache.integrity.verify import verify_bytes
from headrace.cache.manifest import read_manifest
from headrace.cache.publish import create_feature_set, publish_shard, shard_path

SPEC = make_spec()
UNITS = 5


class CacheHistory(RuleBasedStateMachine):
    """The model: which units are listed, which of these are broken, and whether the manifest or the
    spec is.
    """

    @initialize()
    def start(self):
        self.root = Path(tempfile.mkdtemp(prefix="headrace-machine-"))
        self.directory = create_feature_set(self.root, SPEC)
        self.listed, self.broken, self.small = set(), set(), set()

    def teardown(self):
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    @property
    def readable(self):
        return not self.small

    @precondition(lambda self: self.readable)
    @rule(number=st.integers(0, UNITS - 1))
    def extract(self, number):
        """Publishing a listed unit changes nothing, even when its shard is broken: that is for
        repair to say.
        """
        if number in self.broken and shard_path(self.directory, unit_name(number)).exists():
            return
        publish_shard(self.directory, **unit_arguments(SPEC, number))
        self.listed.add(number)
        self.broken.discard(number)

    @precondition(lambda self: self.readable)
    @rule(
        number=st.integers(0, UNITS - 1),
        step=st.integers(1, 45),
        moment=st.sampled_from(["before", "after"]),
    )
    def extract_and_die(self, number, step, moment):
        """A death at any step either listed the unit whole or did not list it."""
        if number in self.broken:
            return

        def work():
            with dying_at(step, moment):
                publish_shard(self.directory, **unit_arguments(SPEC, number))

        assert in_child(work) in (0, -signal.SIGKILL)
        if unit_name(number) in read_manifest(self.directory):
            self.listed.add(number)

    @precondition(lambda self: self.listed - self.broken)
    @rule(choice=st.randoms(use_true_random=False))
    def flip_a_bit(self, choice):
        number = choice.choice(sorted(self.listed - self.broken))
        path = shard_path(self.directory, unit_name(number))
        flip(path, choice.randrange(path.stat().st_size * 8))
        self.broken.add(number)

    @precondition(lambda self: self.listed - self.broken)
    @rule(choice=st.randoms(use_true_random=False))
    def delete_a_shard(self, choice):
        number = choice.choice(sorted(self.listed - self.broken))
        shard_path(self.directory, unit_name(number)).unlink()
        self.broken.add(number)

    @precondition(lambda self: len(self.listed - self.broken) >= 2)
    @rule(choice=st.randoms(use_true_random=False))
    def swap_two_shards(self, choice):
        pair = choice.sample(sorted(self.listed - self.broken), 2)
        one, other = (shard_path(self.directory, unit_name(number)) for number in pair)
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
        self.broken.update(pair)

    @precondition(lambda self: self.readable and self.listed)
    @rule(choice=st.randoms(use_true_random=False))
    def flip_a_bit_of_the_manifest(self, choice):
        path = self.directory / "manifest.jsonl"
        flip(path, choice.randrange(path.stat().st_size * 8))
        self.small.add("manifest")

    @precondition(lambda self: self.readable and self.listed - self.broken)
    @rule(choice=st.randoms(use_true_random=False))
    def flip_a_bit_of_the_spec(self, choice):
        path = self.directory / "spec.json"
        flip(path, choice.randrange(path.stat().st_size * 8))
        self.small.add("spec")

    @precondition(lambda self: self.readable or self.listed - self.broken)
    @rule()
    def repair(self):
        """After a repair everything that is whole is listed, everything else is gone, and nothing
        is wrong.
        """
        done = repair(self.directory)
        self.listed -= self.broken
        self.broken, self.small = set(), set()
        assert {unit_name(number) for number in self.listed} <= set(done.intact_units)
        # A shard whose writer died before listing it is whole too.
        self.listed = {int(unit[1:]) for unit in done.intact_units}
        assert {problem.kind for problem in verify_bytes(self.directory)} <= {"temporary"}
        assert repair(self.directory).was_consistent

    @rule()
    def resume(self):
        """Repair and extract: whatever happened before, everything is there, byte for byte as
        if nothing had.
        """
        if self.readable or self.listed - self.broken:
            self.repair()
            for number in range(UNITS):
                self.extract(number)
            values, ids, content = given(SPEC, range(UNITS))
            features = open_feature_set(self.directory)
            assert features.ids() == ids
            assert np.array_equal(features.load(content, None), values.astype(np.float16))

    @invariant()
    def verify_says_what_is_broken(self):
        if not hasattr(self, "root"):
            return
        problems = [problem for problem in verify_bytes(self.directory) if not problem.is_harmless]
        if self.small:
            assert {problem.kind for problem in problems} == self.small
        else:
            assert {problem.path.stem for problem in problems} == {
                unit_name(number) for number in self.broken
            }

    @invariant()
    def readers_see_whole_units_or_an_error(self):
        if not hasattr(self, "root"):
            return
        if self.small:
            with pytest.raises(CacheError):
                open_feature_set(self.directory)
            return
        features = open_feature_set(self.directory)
        assert {entry.unit for entry in features.entries} == {
            unit_name(number) for number in self.listed
        }
        for position, number in enumerate(sorted(self.listed)):
            rows = np.arange(8) + 8 * position
            if number in self.broken:
                with pytest.raises(CacheError, match=unit_name(number)):
                    features.read(rows)
            else:
                values = unit_arguments(SPEC, number)["features"]
                assert np.array_equal(features.read(rows, None), values.astype(np.float16))


def run_histories(examples: int, steps: int) -> None:
    """Run so many histories of so many steps each; raises at the first that the model does not
    explain.
    """
    random.seed(0)
    run_state_machine_as_test(
        CacheHistory,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )

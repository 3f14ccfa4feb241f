"""A directory's being there says nothing of what is in it: feature sets that a killed
writer began.
"""

import os
import shutil

import pytest
from support.caches import hashes, make_feature_set, make_spec, unit_arguments
from typer.testing import CliRunner

from headrace.cache.errors import CacheError, FeatureSetMissing
from headrace.cache.feature_set import list_feature_sets, open_feature_set
from headrace.cache.integrity.garbage import find_garbage, remove_feature_set
from headrace.cache.integrity.repair import repair
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard
from headrace.pipelines.cli.cache.app import app
from headrace.pipelines.planning.networks import cached_contents, failed_contents

SPEC = make_spec()
HALVES = {"empty": (), "shards": ("shards",), "temporary": ("shards", ".spec.json.0f.partial")}


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def begin(root, half):
    """What a killed writer of an earlier version left."""
    directory = feature_set_path(root, SPEC)
    directory.mkdir(parents=True)
    for name in HALVES[half]:
        (directory / name).touch() if name.startswith(".") else (directory / name).mkdir()
    return directory


@pytest.mark.parametrize("half", HALVES)
def test_a_begun_feature_set_is_absent_for_readers_and_completed_by_writers(tmp_path, half):
    """No reader stumbles over it, no command is refused, and the next writer makes a whole one of
    it.
    """
    other = make_feature_set(tmp_path, 1, make_spec("float32"))
    directory = begin(tmp_path, half)
    assert cached_contents(tmp_path, SPEC) == set()
    assert failed_contents(tmp_path, [SPEC]) == {}
    assert [each.path for each in list_feature_sets(tmp_path)] == [other]
    for command in (["ls"], ["verify"], ["repair"], ["gc", "--yes"]):
        done = call(*command, "--cache", tmp_path)
        assert done.exit_code == 0, done.output
    with pytest.raises(FeatureSetMissing, match="headrace cache ls"):
        open_feature_set(directory)
    publish_shard(create_feature_set(tmp_path, SPEC), **unit_arguments(SPEC, 0))
    assert len(open_feature_set(directory)) == 8


@pytest.mark.parametrize("half", HALVES)
def test_a_begun_feature_set_can_be_removed(tmp_path, half):
    """By its name at once, and by gc once no writer can be at work in it."""
    directory = begin(tmp_path, half)
    assert find_garbage(tmp_path).trash == ()
    assert find_garbage(tmp_path, now_s=os.stat(directory).st_mtime + 7200).trash == (directory,)
    done = call("rm", directory.name[:8], "--cache", tmp_path, "--yes")
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "features").iterdir()) == []


def test_what_is_no_feature_set_is_never_removed(tmp_path):
    """A folder of somebody's, empty or not, stays."""
    for folder in (tmp_path / "mine", tmp_path / "features" / "mine"):
        (folder / "photos").mkdir(parents=True)
        (folder / "photos" / "one.png").touch()
        with pytest.raises(CacheError, match="nothing was removed"):
            remove_feature_set(folder)


def test_shards_whose_spec_is_gone_are_repaired(tmp_path):
    """They are not taken for absent: the error names the command, and the command brings every row
    back.
    """
    directory = make_feature_set(tmp_path, 2)
    (directory / "spec.json").unlink()
    with pytest.raises(FeatureSetMissing, match="headrace cache repair"):
        cached_contents(tmp_path, SPEC)
    assert "broken" in call("ls", "--cache", tmp_path).output
    assert repair(directory).rewritten_files == ("spec.json",)
    assert set(hashes(0, 8)) <= cached_contents(tmp_path, SPEC)


def test_a_directory_appears_with_its_spec(tmp_path, monkeypatch):
    """At no system call is there a directory of that name without spec.json, and what a kill leaves
    is collected.
    """
    directory = feature_set_path(tmp_path, SPEC)
    real, seen = os.link, []

    def looking(*arguments, **options):
        seen.append(directory.exists() and not (directory / "spec.json").exists())
        return real(*arguments, **options)

    monkeypatch.setattr(os, "link", looking)
    create_feature_set(tmp_path, SPEC)
    assert seen == [False]
    left = directory.with_name(".abc.0f.partial")
    shutil.copytree(directory, left)
    assert [each.path for each in list_feature_sets(tmp_path)] == [directory]
    garbage = find_garbage(tmp_path, now_s=os.stat(left).st_mtime + 7200)
    garbage.remove()
    assert not left.exists()
    assert directory.exists()

"""`headrace cache …`, as a user types it."""

import numpy as np
import pytest
from support.caches import flip, make_feature_set, make_spec, unit_name
from support.runs import RECIPE, headrace, make_photos
from typer.testing import CliRunner

from headrace.cache.errors import CacheError
from headrace.cache.feature_set import open_feature_set
from headrace.cache.publish import shard_path
from headrace.pipelines.cli.cache.app import app


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, CacheError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def cache(tmp_path):
    """Two feature sets of one backbone."""
    make_feature_set(tmp_path / "cache", 3)
    make_feature_set(tmp_path / "cache", 2, make_spec("uint8", (4, 3, 3), tap="blocks.6"))
    return tmp_path / "cache"


def test_ls(cache, tmp_path):
    """Each feature set with its tap, backbone, rows, failures, dtype and version; an empty cache
    says how to fill it.
    """
    output = run("ls", "--cache", cache)
    for text in (
        "blocks.4.avg",
        "blocks.6.map",
        "timm:tf_efficientnet_lite0",
        "4x3x3",
        "24",
        "uint8",
        "headrace 0.",
    ):
        assert text in output
    assert "holds no feature sets" in run("ls", "--cache", tmp_path / "none")


def test_ls_shows_a_broken_set_beside_the_others(cache):
    """A broken manifest does not hide the other feature sets."""
    path = next(iter((cache / "features").iterdir())) / "manifest.jsonl"
    flip(path, 100)
    assert "broken" in run("ls", "--cache", cache)


def test_show(cache):
    """Spec, shards, failures with their reasons, and the round-off that was measured."""
    output = run("show", "blocks.6.map", "--cache", cache)
    assert "bad 0/0: truncated: 12 bytes are missing" in output
    features = next(
        f
        for f in (open_feature_set(p) for p in (cache / "features").iterdir())
        if f.spec.dtype == "uint8"
    )
    assert f"largest {features.quantization_error.largest:.3g}" in output
    assert f"{features.quantization_error.relative_rms:.2e}" in output
    assert "16 in 2 shards" in output


def test_a_wrong_name_lists_the_right_ones(cache):
    """The error names what there is."""
    with pytest.raises(
        CacheError,
        match=r"no feature set 'blocks.5.avg'. There are: .*\(blocks.6.map\), .*\(blocks.4.avg\)",
    ):
        run("show", "blocks.5.avg", "--cache", cache)


@pytest.mark.parametrize("command", ["verify", "repair", "gc"])
def test_no_cache_is_not_a_whole_one(tmp_path, command):
    """A mistyped path is an error: silence would mean that everything is well."""
    with pytest.raises(CacheError, match=r"nowhere is no cache: there is no such folder.*--cache"):
        run(command, "--cache", tmp_path / "nowhere")


def test_verify_repair_verify(cache):
    """A flipped bit: verify says so and exits with 1, repair removes the shard, verify
    is content.
    """
    assert "every byte of 24 rows" in run("verify", "--cache", cache)
    directory = next(
        p for p in (cache / "features").iterdir() if open_feature_set(p).spec.tap == "blocks.4"
    )
    flip(shard_path(directory, unit_name(1)), 50_000)
    output = run("verify", "--cache", cache, code=1)
    assert "corrupt: " in output
    assert f"{unit_name(1)}.h5" in output
    assert "1 problem." in output
    assert f"1 removed ({unit_name(1)})" in run("repair", "--cache", cache)
    assert "nothing to repair" in run("repair", "blocks.4.avg", "--cache", cache)
    assert "every byte of 16 rows" in run("verify", "blocks.4.avg", "--cache", cache)


@pytest.mark.slow
def test_rows_of_a_recipes_images_are_extracted_again_and_only_those(tmp_path):
    """Another recipe on the same cache has no image here: that is told, for each of its taps."""
    make_photos(tmp_path / "photos", 6)
    make_photos(tmp_path / "others", 6, seed=1)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "other.yaml").write_text(RECIPE.replace("photos", "others"))
    assert headrace("extract", "recipe.yaml", cwd=tmp_path).returncode == 0
    output = run("verify", "--recipe", tmp_path / "recipe.yaml", "--recompute", 2)
    assert output.count("2 rows extracted again") == 3
    output = run("verify", "--recipe", tmp_path / "other.yaml", "--recompute", 2)
    assert output.count("no row is of an image of the recipe") == 3


def test_sources_need_the_recipe(cache):
    """The message says what to type."""
    with pytest.raises(CacheError, match=r"--recipe recipe\.yaml"):
        run("verify", "--cache", cache, "--sources")


def test_gc_and_rm(cache):
    """gc only says what would go until it is told --yes; rm asks."""
    partial = next(iter((cache / "features").iterdir())) / ".x.partial"
    partial.write_bytes(b"x" * 10)
    assert "0.0 MB would go" in run("gc", "--cache", cache)
    result = CliRunner().invoke(app, ["rm", "blocks.6.map", "--cache", str(cache)], input="n\n")
    assert result.exit_code == 1
    assert len(list((cache / "features").iterdir())) == 2
    assert "removed" in run("rm", "blocks.6.map", "--cache", cache, "--yes")
    assert len(list((cache / "features").iterdir())) == 1


def test_export(cache, tmp_path):
    """The suffix chooses the format; another one needs --format."""
    run("export", "blocks.4.avg", tmp_path / "x.npy", "--cache", cache)
    assert np.load(tmp_path / "x.npy").shape == (24, 12)
    run("export", "blocks.4.avg", tmp_path / "x.bin", "--format", "parquet", "--cache", cache)
    with pytest.raises(CacheError, match="one of npy, parquet, zarr"):
        run("export", "blocks.4.avg", tmp_path / "y.bin", "--cache", cache)


def test_every_command_has_help():
    """Each says what it does, with an example."""
    for command in ("ls", "show", "verify", "repair", "gc", "rm", "export"):
        assert f"headrace cache {command}" in run(command, "--help").replace("\n", " ")

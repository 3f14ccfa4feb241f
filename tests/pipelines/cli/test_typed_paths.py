"""What a typed path overwrites: what headrace wrote there before, and nothing else, with `--force`
or without.
"""

import contextlib
import os
import time
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.caches import make_feature_set
from support.runs import make_photos

from headrace.cache.errors import CacheError, HeadraceError
from headrace.cache.exchange.export import export_npy, export_parquet
from headrace.cache.feature_set import open_feature_set
from headrace.cache.integrity.garbage import STALE_S, remove_temporaries
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.source import ImageSource
from headrace.extract.spec import weights_path
from headrace.pipelines.cli.demo import write_demo
from headrace.pipelines.cli.init import _check_out, write_recipe
from headrace.pipelines.cluster.dask_client import write_settings
from headrace.pipelines.cluster.tls import require_own_folder, write_tls
from headrace.pipelines.errors import InvalidInput, OutputExists
from headrace.pipelines.predict import bulk
from headrace.pipelines.predict.tables import TableBlock, table_writer
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.report.page.blocks import Column, Headline, Section, Table
from headrace.pipelines.report.page.render import render_page
from headrace.pipelines.report.write import require_ours, write_tables
from headrace.pipelines.trackers import mlflow_uri


def test_init_overwrites_recipes_alone(tmp_path):
    """`--out photos/a.png --force` is a slip, and so is the settings file of another program; a
    recipe with a mistake is one.
    """
    (tmp_path / "a.png").write_bytes(b"a")
    with pytest.raises(InvalidInput, match="no recipe"):
        _check_out(tmp_path / "a.png", force=True)
    assert (tmp_path / "a.png").read_bytes() == b"a"
    for text, is_one in (
        ("services: {web: {images: x}}\n", False),
        ("images: [oops\n", True),
        ('{"images": 1}', True),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with (
            contextlib.nullcontext()
            if is_one
            else pytest.raises(InvalidInput, match="has no key `images`")
        ):
            _check_out(tmp_path / "a.yaml", force=True)
        assert (tmp_path / "a.yaml").read_text() == text


TABLES = {
    "labels.csv": b"path,label\na.png,cat\n",
    "files.csv": b"file,class,error\n",
    "notes.txt": b"mine\n",
    "data.jsonl": b'{"file": "a.png", "label": "cat"}\n',
    "damaged.parquet": b"PAR1 and no more",
    "photo.png": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("recorded", [False, True])
def test_predict_replaces_its_own_tables_alone(tmp_path, name, recorded):
    """Whatever else `--out` names is kept, also where a table of predictions stood there before:
    its record is no proof.
    """
    out, about, parts = (tmp_path / f"{name}{ending}" for ending in ("", ".json", ".parts"))
    out.write_bytes(TABLES[name])
    if recorded:
        about.write_text('{"model_digest": "x"}')
    if name == "files.csv":  # a table of predictions of no image
        bulk._require_ours(out, about, parts)
        return
    with pytest.raises(OutputExists, match=r"did not write it.*--out, such as .*predictions\."):
        bulk._require_ours(out, about, parts)
    assert out.read_bytes() == TABLES[name]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("task", ["single", "multi", "regression"])
def test_predict_knows_its_own_tables(tmp_path, kind, task):
    """Of every task and format, with odd names of classes; of values, where the record stands
    beside it.
    """
    out, about, parts = (tmp_path / f"t{ending}" for ending in ("", ".json", ".parts"))
    with table_writer(out, kind, task, ('a "b"', "c,d", "error", "é")) as write:
        write(TableBlock(["x.png", "y.png"], np.eye(2, 4, dtype=np.float32), [None, "broken"]))
    if task != "regression" or kind == "jsonl":
        bulk._require_ours(out, about, parts)
    else:
        with pytest.raises(OutputExists):
            bulk._require_ours(out, about, parts)
    about.write_text('{"model_digest": "x"}')
    bulk._require_ours(out, about, parts)


def test_predict_keeps_what_stands_where_its_record_goes(tmp_path):
    """`labels.csv.json` of somebody else, and what is no file."""
    (tmp_path / "t.csv.json").write_text('{"mine": 1}')
    with pytest.raises(OutputExists, match=r"t\.csv\.json is there"):
        bulk._require_ours(tmp_path / "t.csv", tmp_path / "t.csv.json", tmp_path / "t.csv.parts")
    with pytest.raises(OutputExists, match="neither a table"):
        bulk._require_ours(Path("/dev/null"), tmp_path / "null.json", tmp_path / "null.parts")


def test_a_report_replaces_reports_alone(tmp_path):
    """Its page is known by its title, its tables by standing in pairs."""
    page = tmp_path / "page.html"
    require_ours(page)
    page.write_text(render_page("headrace report: x", "made", Headline(()), ()))
    require_ours(page)
    page.write_bytes(b"")  # holds nothing of anybody's
    require_ours(page)
    page.write_text("<!doctype html><title>mine</title>")
    with pytest.raises(
        OutputExists, match=r"did not write it.*--out, such as .*headrace-report\.html"
    ):
        require_ours(page)
    with pytest.raises(OutputExists, match="is a folder"):
        require_ours(tmp_path)
    table = Table("t", "", (Column("a", "a", "number"),), pd.DataFrame({"a": [1]}))
    sections = (Section("s", "S", "", (table,)),)
    (tmp_path / "t.csv").write_text("mine")
    with pytest.raises(OutputExists, match=r"t\.csv is there"):
        write_tables(tmp_path, sections)
    assert (tmp_path / "t.csv").read_text() == "mine"
    for again in (True, False):
        assert len(write_tables(tmp_path, sections, replace=again)) == 2


def test_the_demo_and_a_certificate_replace_their_own_files_alone(tmp_path, monkeypatch):
    """A folder with a recipe, a key or settings of Dask's is somebody's."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(
        "headrace.pipelines.cli.demo.solar_cells",
        lambda: pd.DataFrame(columns=["id", "path", "label", "probability", "type"]),
    )
    for _ in range(2):
        write_demo(tmp_path / "demo")
    for name in ("recipe.yaml", "solar-cells.csv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(OutputExists, match=f"{name} is there"):
            write_demo(tmp_path / name)
        assert [file.name for file in (tmp_path / name).iterdir()] == [name]
    require_own_folder(write_tls(tmp_path / "tls"))
    for name in ("key.pem", "certificate.pem", "dask.yaml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(OutputExists, match=name):
            require_own_folder(tmp_path / name)


def left_by_a_killed_writer(path, age_s=2 * STALE_S):
    """What it has begun to write beside a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    left.touch()
    os.utime(left, (time.time() - age_s,) * 2)
    return left


def test_what_killed_writers_left_beside_a_typed_path_goes_with_the_next_call(tmp_path):
    """Of that path alone, and not what is still being written: a folder that is typed is the
    user's.
    """
    target, other = tmp_path / "out" / "x.csv", tmp_path / "out" / "y.csv"
    left, young = left_by_a_killed_writer(target), left_by_a_killed_writer(target, 0)
    kept = [young, left_by_a_killed_writer(other), left.with_name(".x.csv.mine.partial")]
    kept[-1].touch()
    os.utime(kept[-1], (0, 0))
    remove_temporaries(target, tmp_path / "nowhere" / "z.csv")
    assert set(target.parent.iterdir()) == set(kept)
    table = Table("t", "", (Column("a", "a", "number"),), pd.DataFrame({"a": [1]}))
    make_photos(tmp_path / "photos", n=4)
    features = open_feature_set(make_feature_set(tmp_path / "cache", 1))
    writers = {
        "tables/t.csv": lambda path: write_tables(path.parent, (Section("s", "S", "", (table,)),)),
        "recipe.yaml": lambda path: write_recipe(tmp_path / "photos", path),
        ".headrace-recipe-schema.json": lambda path: write_recipe(
            tmp_path / "photos", path.with_name("second.yaml")
        ),
        "dask.yaml": lambda path: write_settings(path.parent),
        "f.npy": lambda path: export_npy(features, path),
        "g.rows.csv": lambda path: export_npy(features, path.with_name("g.npy")),
        "h.parquet": lambda path: export_parquet(features, path),
    }
    for name, write in writers.items():
        left = left_by_a_killed_writer(tmp_path / name)
        write(tmp_path / name)
        assert not left.exists(), name


def test_an_array_whose_export_was_killed_is_exported_by_the_same_call(tmp_path):
    """Its table of rows stands there already; another table of that name is not replaced."""
    features = open_feature_set(make_feature_set(tmp_path / "cache", 1))
    array, rows = export_npy(features, tmp_path / "f.npy")
    array.unlink()
    text = rows.read_bytes()
    export_npy(features, array)
    assert rows.read_bytes() == text
    assert len(np.load(array)) == len(features)
    array.unlink()
    rows.write_text("mine")
    with pytest.raises(CacheError, match=r"f\.rows\.csv is there already"):
        export_npy(features, array)
    assert rows.read_text() == "mine"
    assert not array.exists()


def test_a_home_that_is_unknown_is_told_wherever_a_path_is_typed(tmp_path, monkeypatch):
    """`~nobody/…` in every source of images, weights and logs:

    HeadraceError with the name, not a RuntimeError of pathlib's.
    """
    given = "~nobody-of-this-name/x"
    readers = [
        lambda: detect_source(given),
        *(
            lambda kind=kind: read_source(ImageSource(kind, given))
            for kind in ("folder", "table", "archive", "array", "image")
        ),
        lambda: weights_path(f"{given}.pth"),
        lambda: mlflow_uri(given),
    ]
    for read in readers:
        with pytest.raises(HeadraceError, match="there is no such user"):
            read()
    for text in (
        f"images: {{folder: {given}}}",
        f"images: {{folder: a}}\nout: {given}",
        f"images: {{folder: a}}\nlog: {{mlflow: {given}}}",
    ):
        (tmp_path / "r.yaml").write_text(
            f"{text}\nbackbones: [{{name: 'timm:test_resnet', taps: [a.avg]}}]\nheads: {{ridge: "
            "{}}\n"
        )
        with pytest.raises(HeadraceError):
            load_recipe(tmp_path / "r.yaml")

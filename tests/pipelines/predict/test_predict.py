"""`headrace predict`: one row per image in the order given, in three formats, continued after a
kill.
"""

import io
import json
import os
import socket
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from support import forks
from support.models import client_here, run_here
from support.runs import RECIPE, headrace, make_photos

from headrace.extract.errors import SourceError
from headrace.pipelines.cli.main import main
from headrace.pipelines.errors import OutputExists
from headrace.pipelines.models.model import load_model
from headrace.pipelines.predict import bulk, parts
from headrace.pipelines.predict.listing import list_images
from headrace.pipelines.predict.tables import TableBlock, csv_text, json_lines

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with photos, one of them broken, and a finished run. The tests leave it as it is."""
    folder = tmp_path_factory.mktemp("predict")
    make_photos(folder / "photos", n=40)
    (folder / "recipe.yaml").write_text(RECIPE)
    run_here(folder / "recipe.yaml")
    make_photos(folder / "new", n=12, seed=1)
    (folder / "new" / "coarse" / "001.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load_model(run / "headrace-runs" / "recipe")


def test_one_row_per_image_in_the_order_given(run, model, tmp_path):
    """Also for the image that cannot be decoded, with its reason; the others have what the model
    says of them.
    """
    images = list_images([run / "new"]).samples
    summary = bulk.predict_table(model, images, tmp_path / "p.csv", "csv", console=QUIET)
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["file"].tolist() == images["file"].tolist()
    assert list(table.columns) == ["file", "class", "probability", "p_coarse", "p_fine", "error"]
    bad = table["file"].str.endswith("coarse/001.png")
    assert (
        table.loc[bad, "error"].str.startswith("not an image in a format that is read here").all()
    )
    assert table.loc[bad, ["class", "probability", "p_coarse", "p_fine"]].isna().all(axis=None)
    good = table[~bad]
    expected = model.predict_proba(images["path"][~bad].tolist())
    np.testing.assert_allclose(good[["p_coarse", "p_fine"]], expected, atol=1e-3)
    assert (good["class"] == good["file"].str.split("/").str[-2]).mean() > 0.8
    np.testing.assert_allclose(good["probability"], expected.max(1), atol=1e-3)
    assert (summary.images, summary.new, summary.failed) == (13, 13, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.csv.json"]


def test_every_format_says_the_same(run, model, tmp_path):
    """CSV, Parquet and JSON lines hold the same numbers, to the last digit of a float32."""
    images = list_images([run / "new"]).samples
    for kind in ("csv", "parquet", "jsonl"):
        bulk.predict_table(model, images, tmp_path / f"p.{kind}", kind, console=QUIET)
    parquet = pd.read_parquet(tmp_path / "p.parquet")
    text = pd.read_csv(tmp_path / "p.csv")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert parquet["file"].tolist() == text["file"].tolist() == [line["file"] for line in lines]
    np.testing.assert_array_equal(parquet["p_fine"], text["p_fine"].astype(np.float32))
    assert [line.get("error") for line in lines] == [
        None if pd.isna(e) else e for e in parquet["error"]
    ]
    assert [line["probabilities"]["fine"] for line in lines if "class" in line] == text[
        "p_fine"
    ].dropna().tolist()
    assert [line["class"] for line in lines if "class" in line] == text["class"].dropna().tolist()


def test_images_come_from_folders_tables_archives_arrays_and_files(run, model, tmp_path):
    """Each named as a person would, in the order given, with the same prediction for the same
    picture.
    """
    photo = run / "photos" / "fine" / "001.png"
    pixels = np.asarray(Image.open(photo))
    np.save(tmp_path / "stack.npy", np.stack([pixels, pixels]))
    (tmp_path / "table.csv").write_text(f"photo,note\n{photo},first\nabsent.png,second\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(photo, "a.png")
    images = list_images(
        [str(photo), tmp_path / "table.csv", tmp_path / "shard.tar", tmp_path / "stack.npy"],
        path_column="photo",
    ).samples
    assert images["file"].tolist() == [
        str(photo), str(photo), "absent.png", "shard.tar/a.png", "stack.npy/0", "stack.npy/1",
    ]  # fmt: skip
    bulk.predict_table(model, images, tmp_path / "p.parquet", "parquet", console=QUIET)
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert table["error"].isna().tolist() == [True, True, False, True, True, True]
    assert "No such file" in table["error"][2]
    np.testing.assert_allclose(table["p_fine"].dropna(), table["p_fine"][0], atol=1e-3)
    with pytest.raises(SourceError, match="no such file or folder"):
        list_images([tmp_path / "nothing.png"])


def test_a_second_call_does_nothing_and_other_images_are_refused(run, model, tmp_path):
    """What is there and right is left alone, to the byte; a table of other images is replaced only
    when asked.
    """
    images = list_images([run / "new"]).samples
    out = tmp_path / "p.csv"
    bulk.predict_table(model, images, out, "csv", console=QUIET)
    stamp = out.stat().st_mtime_ns
    lock = tmp_path / f".{out.name}.lock"  # of a call that was killed as it removed it
    lock.write_text(f"{2**22 + 1}\n{socket.gethostname()}\n")
    again = bulk.predict_table(model, images, out, "csv", console=QUIET)
    assert not lock.exists()
    assert (again.new, again.failed) == (0, 1)
    assert out.stat().st_mtime_ns == stamp
    with pytest.raises(OutputExists, match="--force"):
        bulk.predict_table(model, images[:5], out, "csv", console=QUIET)
    assert bulk.predict_table(model, images[:5], out, "csv", force=True, console=QUIET).new == 5
    assert len(pd.read_csv(out)) == 5


def test_two_calls_for_one_table_follow_each_other(run, model, tmp_path):
    """The second finds the table finished; side by side they would write it over each other."""
    images = list_images([run / "new"]).samples
    with ThreadPoolExecutor(2) as pool:
        table = tmp_path / "p.csv"
        calls = [
            pool.submit(bulk.predict_table, model, images, table, "csv", console=QUIET)
            for _ in range(2)
        ]
        assert sorted(call.result().new for call in calls) == [0, 13]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.csv.json"]


@pytest.mark.slow
def test_only_what_is_left_is_predicted(run, model, tmp_path, monkeypatch):
    """After a stop in the middle: finished parts stay, a changed, a new and an unreadable file are
    predicted, no other is.
    """
    monkeypatch.setattr(parts, "PART_IMAGES", 4)
    photos = tmp_path / "photos"
    make_photos(photos, n=12, seed=2)
    paths = sorted(photos.rglob("*.png"))
    images = list_images([*map(str, paths[:4]), *map(str, paths)]).samples  # some twice
    images.loc[len(images)] = ["gone", str(photos / "gone.png")]
    whole, stop = parts.predict_part, iter([False, False, True])

    def stopping(job):
        if next(stop):
            raise KeyboardInterrupt
        return whole(job)

    monkeypatch.setattr(parts, "predict_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        bulk.predict_table(model, images, tmp_path / "p.csv", "csv", console=QUIET)
    assert not (tmp_path / "p.csv").exists()
    assert len(list((tmp_path / "p.csv.parts").glob("*.parquet"))) == 2
    next((tmp_path / "p.csv.parts").glob("*.parquet")).write_bytes(b"damaged")
    Image.new("RGB", (40, 40), "red").save(paths[7])
    os.utime(paths[7], ns=(1, 1))
    seen = []
    monkeypatch.setattr(parts, "predict_part", lambda job: seen.extend(job.samples) or whole(job))
    summary = bulk.predict_table(model, images, tmp_path / "p.csv", "csv", console=QUIET)
    kept = 12 + 1 - len(seen)
    assert kept in (3, 4)  # the part that was whole, less the file that was changed if it was in it
    assert str(paths[7]) in [sample.path for sample in seen]
    assert (summary.images, summary.failed) == (17, 1)
    table = pd.read_csv(tmp_path / "p.csv")
    np.testing.assert_array_equal(table["p_fine"][:4], table["p_fine"][4:8])
    np.testing.assert_allclose(
        table["p_fine"][:-1], model.predict_proba(images["path"][:-1])[:, 1], atol=1e-3
    )


def test_workers_predict_the_same(run, model, tmp_path, monkeypatch):
    """Parts that Dask tasks publish are put together in the order of the images."""
    monkeypatch.setattr(parts, "WORTH_WORKERS", 1)
    monkeypatch.setattr("headrace.pipelines.cluster.clients.local_client", client_here)
    images = list_images([run / "photos"]).samples
    bulk.predict_table(model, images, tmp_path / "p.parquet", "parquet", n_workers=2, console=QUIET)
    table = pd.read_parquet(tmp_path / "p.parquet")
    np.testing.assert_allclose(
        table[["p_coarse", "p_fine"]], model.predict_proba(images["path"]), atol=1e-3
    )


def test_the_screen_gets_a_table_too(run, model):
    """With --out -: the same rows as text, as they come."""
    images = list_images([run / "new"]).samples
    stream = io.StringIO()
    summary = bulk.predict_stream(model, images, stream, "csv", console=QUIET)
    table = pd.read_csv(io.StringIO(stream.getvalue()))
    assert table["file"].tolist() == images["file"].tolist()
    assert table["error"].notna().sum() == summary.failed == 1


def test_tables_of_other_tasks():
    """Multi-label names every label of at least one half; regression has the targets'
    own columns.
    """
    block = TableBlock(
        ["a.png", "b,\n.png"],
        np.array([[0.9, 0.5], [np.nan, np.nan]], np.float32),
        [None, "broken"],
    )
    text = csv_text(block, "multi", ("x", "y"), with_header=True)
    assert text == 'file,class,p_x,p_y,error\na.png,x;y,0.9,0.5,\n"b,\n.png",,,,broken\n'
    assert (
        csv_text(block, "regression", ("x", "y"), with_header=False)
        == 'a.png,0.9,0.5,\n"b,\n.png",,,broken\n'
    )
    assert [
        json.loads(line) for line in json_lines(block, "regression", ("x", "y")).splitlines()
    ] == [
        {"file": "a.png", "values": {"x": 0.9, "y": 0.5}},
        {"file": "b,\n.png", "error": "broken"},
    ]


def test_bad_input_is_one_clear_error(run, tmp_path, monkeypatch, capsys):
    """No model, no image, no such format: exit code 2, what was found, what to type."""
    cases = [
        (["predict", tmp_path, run / "new"], "is not a run's directory"),
        (["predict", "headrace-runs/recipe", "absent.png"], "no such file or folder"),
        (["predict", "headrace-runs/recipe", "new", "-o", "p.xlsx"], ".parquet"),
    ]
    monkeypatch.chdir(run)
    for arguments, said in cases:
        monkeypatch.setattr(sys, "argv", ["headrace", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("Error:")
        assert said in error


@pytest.mark.slow
def test_a_killed_prediction_goes_on_where_it_was(run, model, tmp_path):
    """SIGKILL once the first part is there: the next call predicts the rest alone, and the table is
    that of one call.
    """
    make_photos(tmp_path / "many", n=400, seed=3)
    command = [
        "predict",
        str(run / "headrace-runs" / "recipe"),
        "many",
        "-o",
        "p.csv",
        "--workers",
        "1",
    ]
    parts = tmp_path / "p.csv.parts"
    with (tmp_path / "said.txt").open("w") as said:
        call = forks.start(command, cwd=tmp_path, stdout=said, stderr=said)
    while not list(parts.glob("*.parquet")):
        assert call.poll() is None
        time.sleep(0.005)
    call.kill()
    call.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert kept
    assert not (tmp_path / "p.csv").exists()
    done = headrace(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{400 - 256 * len(kept):,} of them predicted now" in done.stderr
    assert not parts.exists()
    table = pd.read_csv(tmp_path / "p.csv")
    images = list_images([tmp_path / "many"]).samples
    assert table["file"].tolist() == [f"many/{name.split('many/')[1]}" for name in images["file"]]
    seam = slice(246, 266)
    np.testing.assert_allclose(
        table["p_fine"][seam], model.predict_proba(images["path"][seam])[:, 1], atol=1e-3
    )

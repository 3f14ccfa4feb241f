"""What `--force` and clean-up replace or remove: what headrace wrote, and nothing else that a user
can type.
"""

import json
from pathlib import Path

import pytest
from support.file_system_faults import die, in_child

from headrace.pipelines.cli.init import _check_out
from headrace.pipelines.cluster import task_leases
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.export import write as export
from headrace.pipelines.export.write import export_model
from headrace.pipelines.predict.parts import remove_parts


def asked(out, *, force=True):
    """The export of a model that is looked at only after OUT: what is refused is refused before."""
    return export_model(None, out, ["safetensors"], force=force)


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A project that is the working directory, with a folder of photos in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"a")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("photos", "did not write"),
        ("photos/", "did not write"),
        (".", "working directory"),
        ("..", "working directory"),
        ("photos/..", "working directory"),
        ("/", "working directory"),
        ("photos/a.png", "is a file"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_no_folder_of_the_users_is_replaced(photos, out, said, force):
    """Photos, the working directory, what holds it: refused before anything is computed, and
    nothing is touched.
    """
    before = everything(photos.parent)
    with pytest.raises(InvalidInput, match=said):
        asked(Path(out), force=force)
    assert everything(photos.parent) == before


def test_a_link_is_not_followed(photos):
    """What it leads to would go, or the link would."""
    link = photos.parent / "link"
    link.symlink_to(photos)
    with pytest.raises(InvalidInput, match="is a link"):
        asked(link)


def test_a_mount_point_is_not_replaced():
    """A whole disk is no export, even where a file of that name lies on it."""
    with pytest.raises(InvalidInput, match="mounted"):
        asked(Path("/proc"))


@pytest.mark.parametrize("name", [export.EXPORT_MARKER, "model.json", "MODEL_CARD.md"])
def test_a_file_of_the_name_alone_is_no_marker(photos, name):
    """The marker has its own content, and old exports have both of their files."""
    (photos / name).write_text("{}")
    with pytest.raises(InvalidInput, match="did not write"):
        asked(photos)


def test_exports_of_earlier_versions_are_known(photos):
    """By model.json and MODEL_CARD.md together; without --force even they stay."""
    (photos / "model.json").write_text(json.dumps({"headrace": "0.1.0", "formats": ["torch"]}))
    (photos / "MODEL_CARD.md").write_text("# Image classifier\n\nWritten by `headrace export`.\n")
    with pytest.raises(InvalidInput, match="--force"):
        asked(photos, force=False)
    with pytest.raises(
        AttributeError
    ):  # it is replaced: the model, which is None here, is looked at
        asked(photos)


def test_what_was_put_there_meanwhile_is_kept(photos, tmp_path):
    """Between the first look and the end lies a computation of minutes: a folder of somebody else
    is set aside, not deleted.
    """
    new = tmp_path / "new"
    new.mkdir()
    export._replace_folder(new, photos)
    (kept,) = tmp_path.glob("photos.kept-*")
    assert (kept / "a.png").read_bytes() == b"a"
    assert photos.is_dir()
    assert not new.exists()


def test_what_killed_exports_left_goes_with_the_next(photos, tmp_path):
    """Folders with our marker whose writer is dead, and its lock; what a living export writes, and
    what is no export's, stays.
    """
    out = tmp_path / "model"
    dead, living = f".model.{task_leases.driver_name()}", f".model.{task_leases.driver_name()}"
    for name in (
        f"{dead}.partial",
        f"{dead}.old.partial",
        f"{living}.partial",
        ".model.0a.partial",
        ".models.0b.partial",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / export.EXPORT_MARKER).write_text(export._MARKER_TEXT)
    (tmp_path / ".model.mine.partial").mkdir()
    (tmp_path / ".model.mine.partial" / "a.png").touch()

    def killed():
        with task_leases.driver_lock(tmp_path, dead):
            die()

    in_child(killed)
    assert (tmp_path / f"{dead}.driver").exists()
    with task_leases.driver_lock(tmp_path, living):
        export._remove_dead(out)
        kept = {
            f"{living}.partial",
            f"{living}.driver",
            ".models.0b.partial",
            ".model.mine.partial",
            "photos",
        }
        assert {path.name for path in tmp_path.iterdir()} == kept
    export._remove_dead(out)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".models.0b.partial",
        ".model.mine.partial",
        "photos",
    }


def test_predict_removes_its_own_parts_alone(photos):
    """A folder that is called as predict's own is not deleted with what a user has put into it."""
    parts = photos.parent / "p.csv.parts"
    parts.mkdir()
    (parts / f"{'0a' * 12}.parquet").touch()
    for name in ("table.partial", "record.partial", f".record.partial.{'0a' * 16}.partial"):
        (parts / name).touch()
    (parts / "mine.parquet").touch()
    remove_parts(parts)
    assert [file.name for file in parts.iterdir()] == ["mine.parquet"]
    (parts / "mine.parquet").unlink()
    remove_parts(parts)
    assert not parts.exists()


def test_init_overwrites_recipes_alone(photos):
    """`--out photos/a.png --force` is a slip."""
    with pytest.raises(InvalidInput, match="no recipe"):
        _check_out(photos / "a.png", force=True)
    assert (photos / "a.png").read_bytes() == b"a"

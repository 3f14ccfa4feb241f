"""Samples from folders and tables: one row per image, with its id, its path and whatever the user says about it."""

import difflib
from collections import Counter, deque
from pathlib import Path

import pandas as pd
from pyarrow import ArrowException

from headrace.extract.errors import SourceError, nearest

# What Pillow decodes and people keep data sets in. A folder is searched for these; a table may name any file.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".ppm", ".pgm"}
)

# What people call the sides of a split, in columns and as folders.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "holdout": "test",
}


def list_folder(folder: str | Path) -> pd.DataFrame:
    """One row per image file below `folder`, sorted by id: columns `id`, `path` and `label`.

    The id is the path relative to `folder` with forward slashes; the label is the first directory in it, and missing
    for images that lie directly in the folder. Where the first directories are the sides of a split (`train/cat/1.jpg`,
    `val/cat/2.jpg`), there is a fourth column `split` with their names, and the label is the second directory.
    Hidden files and directories are left out; links are followed once, after the real directories, so that what is
    reached on both ways has its real path's name.
    Raises SourceError when the folder is absent or has no images, saying what was found.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SourceError(_absent(root))
    rows: list[tuple[str, str, tuple[str, ...]]] = []
    others: Counter[str] = Counter()
    for path in _walk(root):
        relative = path.relative_to(root)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            others[path.suffix.lower() or "no suffix"] += 1
            continue
        rows.append((relative.as_posix(), str(path.absolute()), relative.parts[:-1]))
    if not rows:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "no files"
        raise SourceError(
            f"{root}: no images found (found: {found}). Expected one folder per class holding files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}; a CSV or Parquet table can name images of any suffix."
        )
    rows.sort()
    depth = 1 if _is_split([folders for _, _, folders in rows]) else 0
    listed = [(name, path, folders[depth] if len(folders) > depth else None) for name, path, folders in rows]
    samples = pd.DataFrame(listed, columns=["id", "path", "label"])
    return samples.assign(split=[folders[0] for _, _, folders in rows]) if depth else samples


def _is_split(folders: list[tuple[str, ...]]) -> bool:
    """Whether the first directory of every image is a side of a split, the training images having their class below it.

    folders: of every image, from the outermost. Images to be tested on may lie there without a class.
    """
    sides = [SPLIT_WORDS.get(parts[0].lower()) if parts else None for parts in folders]
    has_classes = all(len(parts) > 1 for parts, side in zip(folders, sides, strict=True) if side == "train")
    return None not in sides and "train" in sides and len(set(sides)) > 1 and has_classes


def read_table(
    table: str | Path, *, path_column: str = "path", id_column: str | None = None, root: str | Path | None = None
) -> pd.DataFrame:
    """The rows of a CSV, TSV or Parquet table, in its order: `id`, `path`, then every column of the table.

    Paths are taken relative to `root`, by default the table's own folder, and made absolute. The id is `id_column` as
    text, or else the path as written in the table. Files are not looked for here: a missing one becomes a recorded
    failure of its sample. Raises SourceError for an absent table or column, empty paths, duplicate ids, and columns whose
    names headrace gives to its own (`id`, `path`, `content`, `_content`).
    """
    file = Path(table).expanduser()
    if not file.is_file():
        raise SourceError(_absent(file))
    frame = read_frame(file)
    if frame.empty:
        raise SourceError(f"{file}: the table has no rows. Expected one row per image.")
    for wanted, setting in ((path_column, "path_column"), (id_column, "id_column")):
        if wanted is not None and wanted not in frame.columns:
            columns = [str(column) for column in frame.columns]
            raise SourceError(
                f"{file}: there is no column {wanted!r} ({setting}). Nearest: {nearest(wanted, columns, 1)}. "
                f"The columns are: {', '.join(columns)}."
            )
    _refuse_taken_names(frame, file, path_column, id_column)
    written = frame[path_column]
    if written.isna().any():
        row = int(written.isna().to_numpy().argmax())
        raise SourceError(
            f"{file}: column {path_column!r} is empty in {int(written.isna().sum())} rows, first in row {row + 1}. "
            "Fill it in or delete these rows."
        )
    base = (Path(root).expanduser() if root is not None else file.parent).absolute()
    # Joining an absolute path onto the base keeps the absolute path.
    paths = [str(base / str(value)) for value in written]
    ids = frame[id_column if id_column is not None else path_column].astype(str)
    check_unique(list(ids), str(file))
    kept = frame.drop(columns=[column for column in ("id", "path") if column in frame.columns])
    return pd.concat(
        [pd.Series(list(ids), name="id", index=kept.index), pd.Series(paths, name="path", index=kept.index), kept],
        axis=1,
    ).reset_index(drop=True)


def check_unique(ids: list[str], where: str) -> None:
    """Raises SourceError naming the ids that occur more than once."""
    counts = Counter(ids)
    if len(counts) == len(ids):
        return
    twice = [name for name, count in counts.items() if count > 1]
    raise SourceError(
        f"{where}: {len(twice)} ids occur more than once, for example {', '.join(map(repr, twice[:3]))}. "
        "Each row needs its own id: name a column that has one with id_column, or drop the duplicates."
    )


def _refuse_taken_names(frame: pd.DataFrame, file: Path, path_column: str, id_column: str | None) -> None:
    """Columns that headrace's own would replace: a task that names one would get other values than the table's."""
    own = {"content": "the hash of an image's bytes", "_content": "the hash of an image's bytes"}
    if (id_column or path_column) != "id":
        own["id"] = "what tells rows apart"
    if path_column != "path":
        own["path"] = "where the image is"
    for name, meaning in own.items():
        if name in frame.columns:
            other = {
                "id": ", or take the ids from it: images.id_column: id (in Python: id_column='id')",
                "path": f", or read the images from it: images.path_column: path (now: {path_column})",
            }.get(name, "")
            raise SourceError(
                f"{file}: the table has a column {name!r}, and headrace keeps {meaning} under this name. "
                f"Rename the column, for example to {'image' if name.startswith('_') else 'image_'}{name}{other}."
            )


def _walk(root: Path) -> list[Path]:
    files: list[Path] = []
    seen: set[str] = set()  # real paths of directories, so that a link to a parent does not run for ever
    pending = [root]
    links: deque[Path] = deque()  # last, so that a link to a class's folder does not rename the class
    while pending or links:
        directory = pending.pop() if pending else links.popleft()
        real = str(directory.resolve())
        if real in seen:
            continue
        seen.add(real)
        for entry in sorted(directory.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else pending).append(entry)
            else:
                files.append(entry)  # a broken link too: its image becomes a recorded failure
    return files


def read_frame(file: Path) -> pd.DataFrame:
    """A CSV, TSV or Parquet table as it is. Raises SourceError when it cannot be read as what its name says."""
    suffix = file.suffix.lower()
    try:
        if suffix in (".parquet", ".pq"):
            return pd.read_parquet(file)
        if suffix in (".csv", ".tsv", ".txt"):
            frame = pd.read_csv(file, sep="\t" if suffix == ".tsv" else ",", low_memory=False)
            if not isinstance(frame.index, pd.RangeIndex):  # pandas would take the first values for the rows' names
                raise SourceError(
                    f"{file}: the rows have more values than the header has names ({len(frame.columns)}). "
                    "Give every column a name in the first line, or delete what ends the rows."
                )
            return frame
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file}: cannot be read as {suffix[1:]}: {error}. Expected text in UTF-8 whose first line names the "
            "columns; save it as UTF-8 (iconv -f latin1 -t utf-8), or give a Parquet file the suffix .parquet."
        ) from error
    except SourceError:
        raise
    except (OSError, ValueError, RuntimeError, ArrowException) as error:  # pandas' own are among these
        expected = "a Parquet file" if suffix in (".parquet", ".pq") else "one line of column names, then one per image"
        raise SourceError(
            f"{file}: cannot be read as {suffix[1:]}: {str(error).strip()}. Expected {expected}."
        ) from error
    raise SourceError(f"{file}: a table ends in .csv, .tsv or .parquet; found {suffix or 'no suffix'}.")


def _absent(path: Path) -> str:
    """The message for a path that does not exist or is of the other kind, with the nearest name in its parent."""
    if path.exists():
        kind = "a folder" if path.is_dir() else "a file"
        return f"{path} is {kind}; a folder of images or a .csv, .tsv or .parquet table is read by its own name."
    parent = path.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    hint = f" Did you mean {parent / close[0]}?" if close else f" The nearest folder that exists is {parent}."
    return f"{path}: no such file or folder.{hint}"

"""Samples from folders and tables: one row per image, with its id, its path and whatever the user says about it."""

import difflib
from collections import Counter
from pathlib import Path

import pandas as pd

from headrace.extract.errors import SourceError, nearest

# What Pillow decodes and people keep data sets in. A folder is searched for these; a table may name any file.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".ppm", ".pgm"}
)


def list_folder(folder: str | Path) -> pd.DataFrame:
    """One row per image file below `folder`, sorted by id: columns `id`, `path` and `label`.

    The id is the path relative to `folder` with forward slashes; the label is the first directory in it, and missing
    for images that lie directly in the folder. Hidden files and directories are left out; links are followed once.
    Raises SourceError when the folder is absent or has no images, saying what was found.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SourceError(_absent(root))
    rows: list[tuple[str, str, str | None]] = []
    others: Counter[str] = Counter()
    for path in _walk(root):
        relative = path.relative_to(root)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            others[path.suffix.lower() or "no suffix"] += 1
            continue
        label = relative.parts[0] if len(relative.parts) > 1 else None
        rows.append((relative.as_posix(), str(path.absolute()), label))
    if not rows:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "no files"
        raise SourceError(
            f"{root}: no images found (found: {found}). Expected one folder per class holding files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}; a CSV or Parquet table can name images of any suffix."
        )
    rows.sort()
    return pd.DataFrame(rows, columns=["id", "path", "label"])


def read_table(
    table: str | Path, *, path_column: str = "path", id_column: str | None = None, root: str | Path | None = None
) -> pd.DataFrame:
    """The rows of a CSV, TSV or Parquet table, in its order: `id`, `path`, then every column of the table.

    Paths are taken relative to `root`, by default the table's own folder, and made absolute. The id is `id_column` as
    text, or else the path as written in the table. Files are not looked for here: a missing one becomes a recorded
    failure of its sample. Raises SourceError for an absent table or column, empty paths, and duplicate ids.
    """
    file = Path(table).expanduser()
    if not file.is_file():
        raise SourceError(_absent(file))
    frame = _read(file)
    if frame.empty:
        raise SourceError(f"{file}: the table has no rows. Expected one row per image.")
    for wanted, setting in ((path_column, "path_column"), (id_column, "id_column")):
        if wanted is not None and wanted not in frame.columns:
            columns = [str(column) for column in frame.columns]
            raise SourceError(
                f"{file}: there is no column {wanted!r} ({setting}). Nearest: {nearest(wanted, columns, 1)}. "
                f"The columns are: {', '.join(columns)}."
            )
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


def _walk(root: Path) -> list[Path]:
    files: list[Path] = []
    seen: set[str] = set()  # real paths of directories, so that a link to a parent does not run for ever
    pending = [root]
    while pending:
        directory = pending.pop()
        real = str(directory.resolve())
        if real in seen:
            continue
        seen.add(real)
        for entry in sorted(directory.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                pending.append(entry)
            else:
                files.append(entry)
    return files


def _read(file: Path) -> pd.DataFrame:
    suffix = file.suffix.lower()
    try:
        if suffix in (".parquet", ".pq"):
            return pd.read_parquet(file)
        if suffix in (".csv", ".tsv", ".txt"):
            return pd.read_csv(file, sep="\t" if suffix == ".tsv" else ",")
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors are among these two
        raise SourceError(f"{file}: cannot be read as {suffix[1:]}: {error}") from error
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

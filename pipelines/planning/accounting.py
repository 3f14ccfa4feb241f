"""Where every entry of a source went: each is used, or counted under a reason."""

from dataclasses import dataclass
from typing import Any

from headrace.extract.sources.listing import LeftOut, Listing
from headrace.pipelines.planning.dataset import Dataset


@dataclass(frozen=True)
class Accounting:
    """Counts of the entries of a run's source. `found` is the sum of all others."""

    found: int  # files of a folder, rows of a table, members of an archive, images of an array
    annotations: int  # entries that hold labels of the images: side files in an archive
    left_out: tuple[LeftOut, ...]  # entries that are not samples, by reason
    unreadable: int  # images whose file cannot be read
    unlabelled: int  # images without a target, which are predicted in the end
    failed: int  # images that cannot be decoded, or whose features cannot be stored
    train: int  # images that heads are trained and validated on
    test: int

    def sentence(self) -> str:
        """Return counts as "Images: 52 found = 30 to train on + 10 to test on + 12 left out"."""
        named_counts = (
            (self.train, "to train on"),
            (self.test, "to test on"),
            (self.unlabelled, "without a label, to predict"),
            (self.unreadable, "that cannot be read"),
            (self.failed, "that cannot be used"),
            (self.annotations, "side files with labels"),
            (sum(item.count for item in self.left_out), "left out"),
        )
        return f"Images: {self.found:,} found = " + " + ".join(
            f"{count:,} {use}" for count, use in named_counts if count
        )


def count_entries(
    listing: Listing, n_unreadable: int, dataset: Dataset, kept_dataset: Dataset
) -> Accounting:
    """Return a run's counts; `kept_dataset`: the images that all feature sets can hold."""
    n_before, n_kept = (
        len(rows.train.ids) + len(rows.test.ids) + len(rows.unlabelled.ids)
        for rows in (dataset, kept_dataset)
    )
    return Accounting(
        listing.found,
        listing.annotations,
        listing.left_out,
        n_unreadable,
        len(kept_dataset.unlabelled.ids),
        n_before - n_kept,
        len(kept_dataset.train.ids),
        len(kept_dataset.test.ids),
    )


def accounting_from_json(values: dict[str, Any]) -> Accounting:
    """Inverse of `dataclasses.asdict`. Raises TypeError or KeyError for other values."""
    left_out = tuple(
        LeftOut(item["reason"], item["count"], tuple(item["examples"]))
        for item in values["left_out"]
    )
    return Accounting(**{**values, "left_out": left_out})

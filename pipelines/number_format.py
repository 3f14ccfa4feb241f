"""Numbers as text for the terminal and the report."""

import re

from headrace.cache.count_text import count_text


def work_text(seconds: float, device: str) -> str:
    """Return "12 core-seconds", "3.4 core-minutes" or "28 core-hours"; device: core or GPU."""
    unit, size = next(
        (unit, size)
        for unit, size in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if seconds >= size or size == 1
    )
    amount = seconds / size
    return f"{amount:.1f} {device}-{unit}" if amount < 10 else f"{amount:,.0f} {device}-{unit}"


def images_text(
    images: int, groups: int | None, units: int | None = None, *, group_column: str | None = None
) -> str:
    """Return "50 images", "50 images of 12 groups (patient)" or "20 units of 50 images".

    group_column: None if the groups are not the user's, but copies and crops of one image.
    """
    if units is not None:
        has_groups = groups is not None and groups < units
        in_groups = f" in {count_text(groups or 0, 'group')}" if has_groups else ""
        return f"{count_text(units, 'unit')} of {count_text(images, 'image')}{in_groups}"
    if groups is None or groups >= images:
        return count_text(images, "image")
    if group_column is None:
        return f"{images:,} images ({groups:,} where copies and crops of one count once)"
    return f"{images:,} images of {count_text(groups, 'group')} ({group_column})"


def utc_text(iso_time: str) -> str:
    """Return a time in ISO 8601 as "2026-11-30 18:11:25 UTC"; other text as it is."""
    return re.sub(r"^(\S+)T(\d\d:\d\d:\d\d)\S*\+00:00$", r"\1 \2 UTC", str(iso_time))


def level_text(level: float) -> str:
    """Return "95 %"."""
    return f"{100 * level:g} %"


def number_text(value: float, metric: str) -> str:
    """Return a score: per cent of shares such as accuracy, or four decimals."""
    if value != value:  # nan, such as the spread over a single fold
        return "–"
    return f"{value * 100:.2f} %" if is_share(metric) else f"{value:.4f}"


def is_share(metric: str) -> bool:
    """Return whether a metric is given in per cent."""
    return metric in ("accuracy", "balanced_accuracy", "hamming_accuracy")


def bytes_text(count: float) -> str:
    """Return "1.5 GB" (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"

"""Numbers as text for the terminal and the report: scores, levels, bytes, hours."""


def hours_text(seconds: float) -> str:
    """Return hours with two digits that mean something."""
    return f"{seconds / 3600:.2g}" if seconds < 36000 else f"{seconds / 3600:,.0f}"


def images_text(images: int, groups: int | None, units: int | None = None) -> str:
    """Return "50 images", "50 images of 12 groups" where images are not independent of each other,
    or "20 units of 50 images" where units are scored.
    """
    if units is not None:
        in_groups = f" in {groups:,} groups" if groups is not None and groups < units else ""
        return f"{units:,} units of {images:,} images{in_groups}"
    return f"{images:,} images" + (
        f" of {groups:,} groups" if groups is not None and groups < images else ""
    )


def level_text(level: float) -> str:
    """Return "95 %"."""
    return f"{100 * level:g} %"


def number_text(value: float, metric: str) -> str:
    """Return shares as per cent, everything else with four digits."""
    if value != value:  # nan: nothing to compare, as the spread over one fold
        return "–"
    return f"{value * 100:.2f} %" if is_share(metric) else f"{value:.4f}"


def is_share(metric: str) -> bool:
    """Tell whether a metric is said in per cent."""
    return metric in ("accuracy", "balanced_accuracy", "hamming_accuracy")


def bytes_text(count: float) -> str:
    """Return "1.5 GB" (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"

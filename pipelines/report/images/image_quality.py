"""Image quality: sizes, and the images that are darkest, brightest, flattest and least sharp."""

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.report.images.small_copies import MEASURED_SIDE, SmallCopies
from headrace.pipelines.report.page.blocks import (
    Block,
    Column,
    Facts,
    Gallery,
    Note,
    Section,
    Table,
)
from headrace.pipelines.report.page.thumbnails import Thumbnails

SHOWN = 6  # pictures at each end of a scale
MEASURES = ("brightness", "contrast", "sharpness")
# measure, whether its smallest values are shown, caption
_EXTREMES = (
    ("brightness", True, "The darkest"),
    ("brightness", False, "The brightest"),
    ("contrast", True, "The flattest, of least contrast"),
    ("sharpness", True, "The least sharp: blurred, or of smooth things"),
)


def measured_frame(copies: SmallCopies) -> pd.DataFrame:
    """Return width, height, brightness, contrast and sharpness of images, by content hash."""
    names = ("width", "height", *MEASURES)
    return pd.DataFrame(
        [[getattr(copy, name) for name in names] for copy in copies.by_content.values()],
        index=pd.Index(list(copies.by_content), dtype=object),
        columns=list(names),
    )


def quality_section(
    run: FinishedRun,
    images: pd.DataFrame,
    copies: SmallCopies,
    measured: pd.DataFrame,
    thumbnails: Thumbnails,
) -> Section:
    """Return the section, on the images that small copies were made of."""
    title = "Image quality"
    lead = (
        f"Measured on grey copies of {MEASURED_SIDE} pixels. A picture at an end of a scale is "
        "often an image that should not be there."
    )
    # Without images, or with --pictures 0.
    if measured.empty:
        reason = run.images if isinstance(run.images, str) else "no image was read for this page"
        return Section("quality", title, lead, (Note(f"Not measured: {reason}."),))
    blocks: list[Block] = [_size_facts(measured, images, copies)]
    # Copies of an image would fill all places at an end of a scale.
    frame = images.drop_duplicates("content").set_index("content")[["id", "split"]]
    frame = frame.join(measured, how="inner")
    for name, is_smallest, caption in _EXTREMES:
        extremes = frame.sort_values([name, "id"], ascending=[is_smallest, True]).head(SHOWN)
        pictures = tuple(
            thumbnails.picture(
                [str(content)],
                [f"{row['id']}: {name} {row[name]:.3f}"],
                str(row["id"]),
                ((name, f"{row[name]:.3f}"), ("size", f"{row['width']} × {row['height']}")),
            )
            for content, row in extremes.iterrows()
        )
        blocks.append(Gallery(caption, pictures))
    columns = (
        Column("id", "image"),
        Column("split", "side"),
        Column("width", "width", "count", "in pixels"),
        Column("height", "height", "count"),
        Column("brightness", "brightness", "number", "mean of grey: 0 black, 1 white"),
        Column("contrast", "contrast", "number", "standard deviation of grey"),
        Column(
            "sharpness",
            "sharpness",
            "number",
            "standard deviation of the Laplacian of grey (Pech-Pacheco et al. 2000)",
        ),
    )
    table = Table("image-quality", "Every image that was measured", columns, frame, search=True)
    return Section("quality", title, lead, (*blocks, table))


def _size_facts(measured: pd.DataFrame, images: pd.DataFrame, copies: SmallCopies) -> Facts:
    sizes = measured[["width", "height"]].value_counts()
    commonest = sizes.index.tolist()[0]
    pixels = measured["width"] * measured["height"]
    ends = [measured.iloc[int(row)] for row in (pixels.argmin(), pixels.argmax())]
    n_images = images["content"].nunique()
    left_out = f"; {copies.unreadable:,} could not be read" if copies.unreadable else ""
    ends_text = " and ".join(f"{end['width']:.0f} × {end['height']:.0f}" for end in ends)
    facts = {
        "images measured": f"{len(measured):,} of {n_images:,} that differ{left_out}",
        "commonest size": f"{commonest[0]} × {commonest[1]} pixels, "
        f"{count_text(int(sizes.iloc[0]), 'image')}; {count_text(len(sizes), 'size')} in all",
        "smallest and largest": f"{ends_text} pixels",
    }
    for name in MEASURES:
        values = measured[name]
        range_text = f"from {values.min():.3f} to {values.max():.3f}"
        facts[name] = f"median {values.median():.3f}, {range_text}"
    return Facts(facts)

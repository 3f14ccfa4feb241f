"""A count with its noun, as messages of all packages say it."""


def count_text(count: int, singular: str, plural: str | None = None) -> str:
    """Return "1 image" or "1,200 images".

    plural: for "classes", and for a noun with its verb: "image has", "images have".
    """
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"

"""Locators: where a sample's bytes are. A plain path is a file; `ARCHIVE::KIND:DETAILS` is one item inside a file."""


def read_bytes(path: str) -> bytes:
    """The bytes of one sample. Raises OSError."""
    with open(path, "rb") as file:
        return file.read()

"""A shard's bytes: layout, storage dtypes and compression, as FORMAT.md describes them."""

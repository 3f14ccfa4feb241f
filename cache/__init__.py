"""Features on disk: immutable HDF5 shards that can be trusted. The format is in FORMAT.md."""

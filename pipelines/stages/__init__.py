"""The stages of a run as Dask tasks."""

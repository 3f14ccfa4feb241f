"""Dask clients on this machine, SLURM and others, and the tasks that run on them."""

"""Dask clients for this machine, SLURM and other clusters, and running of tasks on them."""

"""Finished runs for the tests of delivery, made within the process: no worker has to start."""

from contextlib import contextmanager

from dask.distributed import Client
from rich.console import Console

from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.run import run_recipe


@contextmanager
def client_here(*_, **__):
    with Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as client:
        yield client


def run_here(recipe_path, console=None):
    """The recipe's run within this process."""
    with client_here() as client:
        return run_recipe(
            load_recipe(recipe_path), console=console or Console(quiet=True), client=client
        )

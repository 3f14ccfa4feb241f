"""`headrace cluster …`: preparation of a cluster on other machines."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from headrace.pipelines.cli.options import JsonOption, print_json
from headrace.pipelines.console import make_console

app = typer.Typer(
    no_args_is_help=True, help="Prepare a cluster: certificates for encrypted traffic."
)


@app.callback()
def _group() -> None:
    pass  # with a callback, typer keeps `tls` as a sub-command although it is the only one


@app.command("tls")
def tls_command(
    folder: Annotated[
        Path,
        typer.Argument(help="Where key and certificate go; every node of the cluster must see it."),
    ],
    json_output: JsonOption = False,
) -> None:
    """Make the certificate that scheduler, workers and runs of one cluster show each other.

    A certificate that is there is kept.

    Example: headrace cluster tls ~/headrace-tls
    """
    from headrace.pipelines.cluster.dask_client import PRELOAD, write_settings
    from headrace.pipelines.cluster.tls import CERTIFICATE, KEY, require_own_folder, write_tls

    # Before anything is written: files of another program are not replaced.
    require_own_folder(folder)
    tls_folder = write_tls(folder).absolute()
    certificate_path, key_path = (
        shlex.quote(str(tls_folder / file_name)) for file_name in (CERTIFICATE, KEY)
    )
    tls_options = (
        f"--tls-ca-file {certificate_path} --tls-cert {certificate_path} --tls-key {key_path}"
    )
    settings_path = write_settings(tls_folder)
    if json_output:
        print_json(
            "cluster tls",
            folder=tls_folder,
            certificate=tls_folder / CERTIFICATE,
            key=tls_folder / KEY,
            settings=settings_path,
        )
        return
    # Dask reads the settings of its own file, in schedulers and workers that people start.
    settings_variable = f"DASK_CONFIG={shlex.quote(str(settings_path))}"
    instructions = (
        f"Wrote {tls_folder}. Whoever can read it can run code on the cluster: keep it to "
        "yourself.\n\n"
        "A scheduler, on one machine:\n"
        f"  {settings_variable} dask scheduler --protocol tls --port 8786 --no-dashboard "
        f"{tls_options}\n"
        "Workers, on each machine (one process per core, one thread each):\n"
        f"  {settings_variable} dask worker tls://HOST:8786 --nworkers auto --nthreads 1 --preload "
        f"{PRELOAD} {tls_options}\n"
        "Runs, in the recipe:\n"
        f"  cluster:\n    where: tls://HOST:8786\n    tls: {tls_folder}\n"
        "SLURM needs none of this: a run makes its own certificate in its directory."
    )
    make_console().print(instructions, soft_wrap=True)

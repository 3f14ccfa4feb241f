"""The commands of `headrace cache`."""

import typer

from headrace.pipelines.cli.cache.check import repair_command, verify_command
from headrace.pipelines.cli.cache.exchange import export_command, import_command
from headrace.pipelines.cli.cache.remove import gc_command, remove_command
from headrace.pipelines.cli.cache.show import list_command, show_command

app = typer.Typer(
    no_args_is_help=True, help="What is in a feature cache; verify, repair, clean, export."
)
app.command("ls")(list_command)
app.command("show")(show_command)
app.command("verify")(verify_command)
app.command("repair")(repair_command)
app.command("gc")(gc_command)
app.command("rm")(remove_command)
app.command("export")(export_command)
app.command("import")(import_command)

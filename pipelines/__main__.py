"""`python -m headrace.pipelines` is the command `headrace`."""

from headrace.pipelines.cli.main import main

main()

"""`python -m headrace.pipelines` is the command `headrace`."""

from headrace.pipelines.cli import main

main()

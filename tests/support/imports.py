"""What an import of ours loads."""

import subprocess
import sys


def loaded_after(code: str) -> set[str]:
    """Names of the top-level modules that a fresh interpreter has loaded after running the code."""
    script = (
        f"{code}\nimport sys\nprint(' '.join(sorted({{name.split('.')[0] for name in "
        "sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return set(done.stdout.splitlines()[-1].split())

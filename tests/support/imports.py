"""What imports of ours load."""

import subprocess
import sys


def loaded_after_each(*codes: str) -> list[set[str]]:
    """Names of the top-level modules that one fresh interpreter has loaded after each code."""
    told = "import sys\nprint('loaded', *sorted({name.split('.')[0] for name in sys.modules}))"
    script = "\n".join(f"{code}\n{told}" for code in codes)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    lines = (line.split() for line in done.stdout.splitlines())
    return [set(words[1:]) for words in lines if words[:1] == ["loaded"]]

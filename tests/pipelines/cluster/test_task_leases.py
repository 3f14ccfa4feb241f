"""Which of several drivers does a task."""

import os
import subprocess
import sys

from headrace.pipelines.cluster.task_leases import driver_lives, remove_dead, task_leases

HOLD = """
import sys
from pathlib import Path
from headrace.pipelines.cluster.task_leases import task_leases
with task_leases(Path(sys.argv[1])) as ours:
    print(ours.acquire("bank"), flush=True)
    sys.stdin.read()
"""


def test_a_lease_is_one_drivers_until_it_is_dropped(tmp_path):
    """Taking twice is no harm; another driver is refused until the lease is given back."""
    with task_leases(tmp_path) as one, task_leases(tmp_path) as other:
        assert one.acquire("bank")
        assert one.acquire("bank")
        assert not other.acquire("bank")
        assert other.acquire("second")
        one.release("bank")
        assert other.acquire("bank")
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_driver_had_is_free(tmp_path):
    """A driver that was killed holds its leases no longer, and says nothing of it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "True\n"
    (name,) = {path.stem for path in tmp_path.glob("*.driver")}
    with task_leases(tmp_path) as ours:
        assert driver_lives(tmp_path, name)
        assert not ours.acquire("bank")
        holder.kill()
        holder.communicate()
        ours._seen_alive.clear()
        assert ours.acquire("bank")
        assert os.readlink(tmp_path / "bank.lease") == ours.driver


def test_what_dead_drivers_left_goes_by_itself(tmp_path):
    """Leases, locks, and locks without a name in them, or half of one; what a living driver has
    stays.
    """
    code = (
        "import os, sys; from pathlib import Path; from headrace.pipelines.cluster.task_leases "
        "import task_leases\n"
    )
    code += "with task_leases(Path(sys.argv[1])) as ours: ours.acquire('bank-x'); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    for name, text in (("node-1-abcd", ""), ("node-3-abcd", "filelock/2\npid=12")):
        torn = tmp_path / f"20261124T181500Z-{name}.driver"
        torn.write_text(text)
        os.utime(torn, (1, 1))
    os.symlink("20261124T181500Z-node-2-abcd", tmp_path / "bank-z.lease.0f")
    with task_leases(tmp_path) as living:
        assert living.acquire("bank-y")
        names = {f"{living.driver}.driver", "bank-y.lease"}
        assert {path.name for path in tmp_path.iterdir()} == names
        with task_leases(tmp_path):
            pass
        assert remove_dead(tmp_path) == 0
        assert {path.name for path in tmp_path.iterdir()} == names
    assert list(tmp_path.iterdir()) == []

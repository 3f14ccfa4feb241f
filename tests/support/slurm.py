"""A real SLURM on this machine, from Debian's packages, for as long as a test module runs.

It needs no systemd.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

_NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")


def why_not():
    """Why no SLURM can be started here; None if it can."""
    missing = [name for name in _NEEDED if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "munged and slurmd need root"
    return None


@contextlib.contextmanager
def munge():
    """The authentication that SLURM's processes need; one that runs already is left as it is."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        yield
        return
    if not Path("/etc/munge/munge.key").exists():
        subprocess.run(["mungekey", "-c"], check=True)
    for folder in ("/etc/munge", "/run/munge", "/var/log/munge", "/var/lib/munge"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        subprocess.run(["chown", "-R", "munge:munge", folder], check=True)
    Path("/run/munge").chmod(0o755)
    daemon = subprocess.Popen(["munged", "--foreground", "--force"], user="munge", group="munge")
    try:
        _wait(
            lambda: (
                subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0
            ),
            "munged",
        )
        yield
    finally:
        daemon.terminate()
        daemon.wait(20)


@contextlib.contextmanager
def slurm(folder):
    """A controller and one node; yields the path of the configuration, which is in SLURM_CONF
    meanwhile.
    """
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = _free_ports(2)
    configuration = folder / "slurm.conf"
    configuration.write_text(f"""\
ClusterName=headrace
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} CPUs=4 RealMemory=16000 State=UNKNOWN
PartitionName=heads Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=images Nodes={host} MaxTime=INFINITE State=UP
""")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(configuration)
    daemons = []
    try:
        with munge():
            for command in (["slurmctld", "-D"], ["slurmd", "-D"]):
                with (folder / f"{command[0]}.out").open("wb") as out:
                    daemons.append(
                        subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
                    )
            try:
                _wait(_idle, f"slurmd, see {folder}")
                yield configuration
            finally:
                subprocess.run(["scancel", "--user=root"], check=False)
                time.sleep(1)
                for daemon in reversed(daemons):
                    daemon.terminate()
                for daemon in daemons:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        daemon.wait(20)
                    if daemon.poll() is None:
                        os.killpg(daemon.pid, signal.SIGKILL)
    finally:
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def jobs(states="all"):
    """The jobs that the controller knows, as {id: state}."""
    command = ["squeue", "--noheader", f"--states={states}", "--format=%A %T"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split() for line in lines)


def _idle():
    answer = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, check=False
    )
    return "idle" in answer.stdout


def _wait(condition, what, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} did not start"
        time.sleep(0.2)


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

"""A SLURM cluster of one node on this machine, without systemd: what tests/test_slurm.py runs on."""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CPUS = 4  # more than there may be: what is tested is who runs when

CONF = """
ClusterName=w2s
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
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
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=usual Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> list[str]:
    """Programs of SLURM and munge that are not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
    return [program for program in PROGRAMS if not shutil.which(program, path=path)]


class Cluster:
    """Use it as a context manager. `environ`: the environment in which SLURM's programs and ours find it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"}

    def __enter__(self):
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge/key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(2)]
            for s in sockets:
                s.bind(("127.0.0.1", 0))
            ports = [s.getsockname()[1] for s in sockets]
        text = CONF.format(host=socket.gethostname().split(".")[0], ports=ports, user=getpass.getuser(), folder=self.folder, cpus=CPUS)
        (self.folder / "slurm.conf").write_text(text)
        try:
            files = {"key": key, "pid": self.folder / "munged.pid", "log": self.folder / "munged.log", "seed": self.folder / "munge/seed"}
            self.call("munged", "--force", f"--socket={self.folder}/munge/socket", *(f"--{k}-file={file}" for k, file in files.items()))
            self.call("slurmctld", "-c")
            self.call("slurmd", "-c")
            end = time.monotonic() + 60
            while "idle" not in self.call("sinfo", "--noheader", "--format=%T"):
                if time.monotonic() > end:
                    raise RuntimeError("the node does not become idle")
                time.sleep(0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for name in ("slurmd", "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.folder / f"{name}.pid").read_text())
                os.kill(pid, signal.SIGTERM)
                for _ in range(100):
                    os.kill(pid, 0)
                    time.sleep(0.1)

    def call(self, *words, **options) -> str:
        """What one of SLURM's programs prints. RuntimeError where it fails."""
        done = subprocess.run([str(w) for w in words], env=self.environ, capture_output=True, text=True, timeout=60, **options)
        if done.returncode:
            raise RuntimeError(f"{words[0]}: {done.stderr.strip() or done.stdout.strip() or done.returncode}; {self.last_lines()}")
        return done.stdout

    def last_lines(self) -> str:
        """The ends of the daemons' logs."""
        logs = [self.folder / f"{name}.log" for name in ("munged", "slurmctld", "slurmd")]
        return " | ".join(log.read_text(errors="replace").strip().splitlines()[-1] for log in logs if log.exists() and log.stat().st_size)

    def wait(self, seconds: float, done=None) -> None:
        """Returns when `done()`, or when no job is left. RuntimeError after `seconds`."""
        end = time.monotonic() + seconds
        while not (done() if done else not self.call("squeue", "--noheader").strip()):
            if time.monotonic() > end:
                raise RuntimeError(f"after {seconds} s: {self.call('squeue')}")
            time.sleep(0.3)

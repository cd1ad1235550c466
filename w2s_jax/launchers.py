"""Which job this process belongs to, as its launcher says it: flags, Open MPI, SLURM or a TPU slice. No jax.

Sources: the output environment variables of srun(1); mpirun(1) of Open MPI 4 and 5 (PRRTE's namespaces); Cloud TPU's metadata
(`agent-worker-number`, `worker-network-endpoints`) and the variables that GKE and multislice set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from w2s_jax.errors import UserError

LOOPBACK = "127.0.0.1"
PORTS = range(20000, 32000)  # below what Linux gives to outgoing connections (32768 and above)
TRIED = 8  # ports that the processes of a job look for each other on
METADATA_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of several processes. `ports`: where process 0 may be found on `host`, in this order. `launcher`: who said so, for
    messages. `token`: what is the same for all processes of a job, and for no other job of its launcher. `local`: the number of
    this process among those on its host, and how many these are; None = not known."""

    process: int
    processes: int
    host: str
    ports: tuple[int, ...]
    launcher: str
    token: str
    local: tuple[int, int] | None = None


def detect(values: Mapping, environ: Mapping[str, str] = os.environ) -> Job | None:
    """The job that this process is one of; None where it stands alone, which opens no port.

    Args:
      values: the flags `coordinator` (host:port), `num_processes`, `process_id`, `distributed` (None or False = not given).

    Raises:
      UserError: flags that do not fit together, a launcher whose word cannot be read, or `distributed` where nothing says who the
        others are.
    """
    coordinator, number, total = values["coordinator"], values["process_id"], values["num_processes"]
    address = _address(coordinator) if coordinator else None
    if number is not None or total is not None:
        if address is None or number is None or total is None:
            missing = [name for name in ("coordinator", "num_processes", "process_id") if values[name] in (None, "")]
            raise UserError(f"--{missing[0]}: is missing; expected --coordinator, --num_processes and --process_id together, or none")
        return _job("flags", number, total, address[0], f"{address[0]}:{address[1]}", port=address[1])
    found = next((job for job in (_open_mpi(environ), _slurm(environ), _tpu(environ)) if job), None)
    if found is None and (address or values["distributed"]):
        flag = f"--coordinator={coordinator}" if address else "--distributed"
        raise UserError(f"{flag}: nothing says which process this is; expected a launcher (srun, mpirun, a TPU slice), or --coordinator, "
                        "--num_processes and --process_id together")
    if found is None or found.processes == 1:
        return None
    if address:
        found = dataclasses.replace(found, host=address[0], ports=_following(address[1]))
    if not found.host:
        raise UserError(f"--coordinator: is missing, since {found.launcher} does not say where process 0 runs; expected host:port")
    return found


def _job(launcher: str, process: int, processes: int, host: str, token: str, *, port: int = 0, local=None) -> Job | None:
    if processes < 1:
        raise UserError(f"{launcher}: {processes} processes, expected 1 or more")
    if not 0 <= process < processes:
        raise UserError(f"{launcher}: process {process} of {processes}, expected a number from 0 to {processes - 1}")
    token = f"{launcher}/{token}/{processes}"
    if port:
        ports = _following(port)
    else:
        start = int.from_bytes(hashlib.sha256(token.encode()).digest()[:4], "big")
        ports = tuple(PORTS[(start + 997 * i) % len(PORTS)] for i in range(TRIED))
    return Job(process, processes, host, ports, launcher, token, local) if processes > 1 or launcher != "flags" else None


def _following(port: int) -> tuple[int, ...]:
    return tuple(range(port, min(port + TRIED, 65536)))


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={text}: expected host:port, with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}={text}: expected a number, as the launcher sets it")
    return int(text)


# --------------------------------------------------------------------------- launchers


def _open_mpi(environ) -> Job | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    processes, process = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK")
    local = None
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        local = (_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"))
    # 4: "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", or tcp6://[fe80::b9b,fe80::1]:43370. 5: "prterun-node1-3425@1".
    uri, namespace = environ.get("OMPI_MCA_orte_hnp_uri", ""), environ.get("PMIX_NAMESPACE", "")
    host, token = "", namespace or uri.partition(";")[0]
    if match := re.search(r"tcp6?://\[?([^],;]+?)(?:,|\]|:\d+(?:;|$))", uri):
        host = match[1]
    elif match := re.fullmatch(r"prterun-(.+)-\d+@\d+", namespace):
        host = match[1]
    if local and local[1] == processes:
        host = LOOPBACK
    return _job("Open MPI", process, processes, host, token, local=local)


def _slurm(environ) -> Job | None:
    # A batch script without srun has SLURM_NTASKS of the job, but is one process: it has no step.
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if not step.isdecimal() or count not in environ or "SLURM_PROCID" not in environ:
        return None
    processes, process = _number(environ, count), _number(environ, "SLURM_PROCID")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST", "")
    host = LOOPBACK if environ.get("SLURM_STEP_NUM_NODES") == "1" else first_host(nodes)
    local = None
    if "SLURM_LOCALID" in environ:  # "2(x3),1": two tasks on each of three nodes, one on the last
        layout = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
                  for _ in range(int(times or 1))]
        node = int(environ.get("SLURM_NODEID") or 0)
        local = (_number(environ, "SLURM_LOCALID"), layout[node] if node < len(layout) else processes)
    return _job("SLURM", process, processes, host, f"{environ.get('SLURM_JOB_ID', '')}.{step}", local=local)


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `node[001-003,7],x1` -> `node001`."""
    head = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def _tpu(environ) -> Job | None:
    if environ.get("JAX_PLATFORMS") and "tpu" not in environ["JAX_PLATFORMS"]:
        return None
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts and "TPU_WORKER_ID" in environ:
        process = _number(environ, "TPU_WORKER_ID")
    elif _on_tpu_vm(environ):
        text = _metadata(environ, "agent-worker-number")
        hosts = _metadata(environ, "worker-network-endpoints")
        if text is None or hosts is None:  # a virtual machine with a TPU of its own
            return None
        if not text.strip().isdecimal():
            raise UserError(f"TPU metadata: agent-worker-number is {text!r}, expected a number")
        process = int(text)
    else:
        return None
    names = [_tpu_host(entry) for entry in hosts.strip().split(",")]
    slices, index = environ.get("MEGASCALE_NUM_SLICES") or "1", environ.get("MEGASCALE_SLICE_ID") or "0"
    if not slices.isdecimal() or not index.isdecimal():
        raise UserError(f"MEGASCALE_NUM_SLICES={slices}, MEGASCALE_SLICE_ID={index}: expected numbers")
    leader = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] if int(slices) > 1 else ""
    return _job("TPU", process + int(index) * len(names), len(names) * int(slices), leader or names[0], leader or ",".join(names))


def _tpu_host(entry: str) -> str:
    """`10.0.0.2`, `host:port`, or the metadata's older `name:number:10.0.0.2`."""
    parts = entry.strip().split(":")
    if len(parts) > 3 or not all(parts):
        raise UserError(f"TPU: cannot read the worker {entry!r}; expected host, host:port or name:number:address")
    return parts[2] if len(parts) == 3 else parts[0]


def _on_tpu_vm(environ) -> bool:
    """Whether a metadata server may be asked: one is named, or there are TPU chips. Elsewhere its name takes seconds not to resolve."""
    if environ.get("TPU_SKIP_MDS_QUERY"):
        return False
    if "GCE_METADATA_HOST" in environ or any(Path("/dev").glob("accel[0-9]*")):
        return True
    return any(Path("/dev/vfio").glob("[0-9]*")) and importlib.util.find_spec("libtpu") is not None  # the newer kinds


def _metadata(environ, key: str) -> str | None:
    """An attribute of this virtual machine; None where it has none of that name."""
    host = environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this host's link
    try:
        with opener.open(request, timeout=METADATA_SECONDS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise UserError(f"TPU metadata: {host} answers {error.code} for {key}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"TPU metadata: {host} does not answer ({error}); TPU_SKIP_MDS_QUERY=1 runs this process alone") from None

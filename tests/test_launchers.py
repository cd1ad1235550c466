"""Which job a process belongs to, as its launcher says it."""

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest

from w2s_jax import launchers, rollcall
from w2s_jax.errors import UserError
from w2s_jax.launchers import LOOPBACK

NONE = {"coordinator": None, "num_processes": None, "process_id": None, "distributed": False}
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8", "SLURM_PROCID": "2",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[007-009,12],x1",
         "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
MPI4 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}  # fmt: skip
MPI5 = {k: v for k, v in MPI4.items() if "uri" not in k} | {"PMIX_NAMESPACE": "prterun-login-2-3425@1"}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}

# flags, environment -> process, processes, host, local; None = one process
FOUND = {
    "nothing": ({}, {}, None),
    "flags": ({"coordinator": "h:7000", "num_processes": 3, "process_id": 1}, SLURM, (1, 3, "h", None)),
    "flags, IPv6": ({"coordinator": "[fe80::1]:7000", "num_processes": 2, "process_id": 0}, {}, (0, 2, "fe80::1", None)),
    "flags for one": ({"coordinator": "h:7000", "num_processes": 1, "process_id": 0}, {}, None),
    "slurm": ({}, SLURM, (2, 4, "node007", (0, 2))),
    "slurm on one node": ({}, SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"},
                          (2, 4, LOOPBACK, (0, 4))),
    "slurm's batch script": ({}, {k: v for k, v in SLURM.items() if "STEP" not in k}, None),
    "slurm, a step of one": ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    "slurm, older": ({}, {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NUM_TASKS"}, (2, 8, "node007", (0, 2))),
    "slurm, told where": ({"coordinator": "10.0.0.9:9000"}, SLURM, (2, 4, "10.0.0.9", (0, 2))),
    "open mpi 4": ({}, MPI4, (3, 4, "10.96.0.1", (1, 2))),
    "open mpi 4, IPv6": ({}, MPI4 | {"OMPI_MCA_orte_hnp_uri": "13.0;tcp6://[fe80::b9b,fe80::1]:43370"}, (3, 4, "fe80::b9b", (1, 2))),
    "open mpi 4, one address": ({}, MPI4 | {"OMPI_MCA_orte_hnp_uri": "13.0;tcp://10.0.0.1:43370"}, (3, 4, "10.0.0.1", (1, 2))),
    "open mpi 4, both kinds": ({}, MPI4 | {"OMPI_MCA_orte_hnp_uri": "1792278528.0;tcp://192.0.2.2:36891;tcp6://[fd00::2]:47515"},
                               (3, 4, "192.0.2.2", (1, 2))),
    "open mpi 5": ({}, MPI5, (3, 4, "login-2", (1, 2))),
    "open mpi in slurm": ({}, SLURM | MPI4, (3, 4, "10.96.0.1", (1, 2))),
    "open mpi on one host": ({}, MPI5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (3, 4, LOOPBACK, (1, 4))),
    "tpu": ({}, TPU, (1, 2, "t1v-0", None)),
    "tpu, asked": ({"distributed": True}, TPU, (1, 2, "t1v-0", None)),
    "tpu, one host": ({}, {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    "tpu, ports": ({}, TPU | {"TPU_PROCESS_ADDRESSES": "10.0.0.1:8476,10.0.0.2:8476"}, (1, 2, "10.0.0.1", None)),
    "tpu, two slices": ({}, TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0:8080"},
                        (3, 4, "s0", None)),
    "tpu, but on the CPU": ({}, TPU | {"JAX_PLATFORMS": "cpu"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_launcher_is_recognised(name):
    flags, environ, want = FOUND[name]
    job = launchers.detect(NONE | flags, environ)
    assert want == (job and (job.process, job.processes, job.host, job.local))
    if job:
        assert len(job.ports) == launchers.TRIED and all(0 < port < 65536 for port in job.ports)


def test_ports_and_tokens_belong_to_one_step_of_a_job():
    def job(**changes):
        return launchers.detect(NONE, SLURM | changes)

    assert (job().ports, job().token) == (job(SLURM_PROCID="0").ports, job(SLURM_PROCID="0").token)
    others = [job(SLURM_STEP_ID="4"), job(SLURM_JOB_ID="78"), job(SLURM_STEP_NUM_TASKS="3")]
    assert len({job().token, *(other.token for other in others)}) == 4
    assert launchers.detect(NONE | {"coordinator": "h:7000", "num_processes": 2, "process_id": 1}, {}).ports == tuple(range(7000, 7008))


BAD = {
    "two of three flags": ({"coordinator": "h:1", "num_processes": 2}, {}, "--process_id: is missing; expected --coordinator"),
    "no coordinator": ({"process_id": 0, "num_processes": 2}, {}, "--coordinator: is missing"),
    "no port": ({"coordinator": "h", "num_processes": 2, "process_id": 0}, {}, "--coordinator=h: expected host:port"),
    "number too large": ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, {}, "process 2 of 2, expected a number from 0 to 1"),
    "no processes": ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, {}, "0 processes, expected 1 or more"),
    "asked for nothing": ({"distributed": True}, {}, "--distributed: nothing says which process this is"),
    "coordinator of nobody": ({"coordinator": "h:1"}, {}, "--coordinator=h:1: nothing says which process this is"),
    "no number": ({}, SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x: expected a number"),
    "no host": ({}, {k: v for k, v in MPI5.items() if "PMIX" not in k}, "Open MPI does not say where process 0 runs; expected host:port"),
    "no worker": ({}, TPU | {"TPU_WORKER_HOSTNAMES": "a:b:c:d"}, "cannot read the worker 'a:b:c:d'"),
    "no server": ({}, {"GCE_METADATA_HOST": "127.0.0.1:1"}, "TPU metadata: 127.0.0.1:1 does not answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_gets_one_line(name):
    flags, environ, message = BAD[name]
    with pytest.raises(UserError) as error:
        launchers.detect(NONE | flags, environ)
    assert message in str(error.value)


def test_what_process_0_says_behind_the_roll_call_is_kept():
    """It may decide before another process has read that all are there: in one piece, both are heard."""
    job = launchers.detect(NONE | {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 1}, {})
    here, there = socket.socketpair()
    with here, there:
        words = {"seen": job.token, "host": "h", "pid": 1}, {"complete": True}, {"said": 1}, {"bye": True}
        there.sendall(b"".join(json.dumps(word).encode() + b"\n" for word in words))
        peer = rollcall.Peer(0, here, "", 0)
        assert rollcall._answered(job, peer, time.monotonic() + 9) and peer.early == [{"said": 1}, {"bye": True}]


@pytest.mark.parametrize("nodes, first", [
    ("a", "a"), ("a,b", "a"), ("node[001-003,7],x1", "node001"), ("node[7,001-003]", "node7"), ("r[1-2]n[3-4],x", "r1n3"),
    ("n1.site[2-3]-ib,m", "n1.site2-ib"), ("", ""),
])  # fmt: skip
def test_the_first_of_a_node_list(nodes, first):
    assert launchers.first_host(nodes) == first


@contextlib.contextmanager
def metadata(attributes: dict[str, str]):
    """A metadata server on this machine."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(403 if self.headers["Metadata-Flavor"] != "Google" else 404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_port}", "http_proxy": "http://127.0.0.1:1"}
        server.shutdown()


@pytest.mark.parametrize("attributes, want", [
    ({"agent-worker-number": "2", "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2,c:2:10.0.0.3"}, (2, 3, "10.0.0.1")),
    ({"agent-worker-number": "0\n", "worker-network-endpoints": "host-0,host-1"}, (0, 2, "host-0")),
    ({"agent-worker-number": "0", "worker-network-endpoints": "host-0"}, None),
    ({}, None),
])  # fmt: skip
def test_the_metadata_of_a_tpu_slice(attributes, want):
    with metadata(attributes) as environ:
        job = launchers.detect(NONE, environ)
    assert want == (job and (job.process, job.processes, job.host))

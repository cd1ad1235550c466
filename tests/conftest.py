"""What every test shares: eight fake CPU devices, no hub, and the way to the command line.

The environment must be set before jax is imported by anyone, so it is set at the top of this file,
which pytest reads first. `JAX_PLATFORMS=cuda pytest ...` overrides the platform.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEVICES = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a broken test
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    """Every test is quick unless it says that it is slow."""
    for item in items:
        if not item.get_closest_marker("slow"):
            item.add_marker("quick")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Forget compiled programs between test files once they are many; see `forward.make_room`."""
    yield
    if "jax" in sys.modules:
        from w2s_jax import forward

        forward.make_room(10_000)  # fewer than `stages.run` allows: no test counts compilations while it makes room


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and golden figures beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def cli():
    """`cli("--config=finetune", ...)` -> CompletedProcess of `python -m w2s_jax.main` in a process of its own (one device)."""

    def call(*arguments, timeout: float = 600, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **environment}
        command = [sys.executable, "-m", "w2s_jax.main", *map(str, arguments)]
        return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout)

    return call


@pytest.fixture(scope="session")
def swept(cli, tmp_path_factory):
    """A tiny sweep made by one process, one run after the other: `.flags` (without executor and workdir), `.environ` (compiles fast, and
    finds what is compiled already), `.root`, `.runs`. What other executors make must be the same."""
    import json
    import types

    import tiny

    folder = tmp_path_factory.mktemp("swept")
    models = [tiny.write_model(folder / name, seed=i, n_embd=12 + 12 * i, n_inner=48) for i, name in enumerate(("tiny", "small"))]
    keys = {"models": ",".join(map(str, models)), "tasks": tiny.write_task(folder / "task"), "losses": "xent", "base__batch_size": 8,
            "base__epochs": 2, "base__learning_rate": 3e-3, "base__checkpoint_every": 0}
    flags = ["--config=sweep", *tiny.flags(**keys)]
    environ = {"XLA_FLAGS": tiny.FAST_FLAGS, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    done = cli(*flags, f"--workdir={folder / 'here'}", **environ)
    assert done.returncode == 0, done.stderr
    runs = json.loads((folder / "here/sweep.json").read_text())["runs"]
    return types.SimpleNamespace(flags=flags, environ=environ, root=folder / "here", runs=runs, models=models, task=folder / "task")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny random GPT-2 (tests/tiny.py)."""
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory) -> Path:
    """Folder of a tiny task that can be learned (tests/tiny.py)."""
    import tiny

    return tiny.write_task(tmp_path_factory.mktemp("tasks") / "tiny")


@pytest.fixture
def fast_compiles(monkeypatch):
    """XLA without its optimizations: the same arithmetic up to rounding, compiled in a fifth of the time. Gives `compile` as it was."""
    import tiny

    return tiny.fast_compiles(monkeypatch)

"""The run directory: who writes it, what it is, its metrics and its results.

    config.json     resolved config, identity, versions, git commit, devices and what the stage adds
    metrics.jsonl   one line a step (on an object store: metrics/<number>.jsonl, since objects cannot be appended to)
    results.json    written last and atomically: a directory that has it is done
    error.json      why the last attempt failed
    .lock, .owner   the claim of the process that writes it now

Of several processes that make one run, process 0 claims and writes; what it finds there, the others hear from it.
Paths are local or `gs://` (etils.epath).
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback

from etils import epath

from w2s_jax import distributed
from w2s_jax.claim import Claim, held
from w2s_jax.errors import UserError
from w2s_jax.files import dumps, is_object_store, parquet_table, plain, read_json, write_json, write_text
from w2s_jax.logger import Logger
from w2s_jax.progress import Progress, say
from w2s_jax.provenance import commit, devices, differences, versions

__all__ = [
    "LoadedRun", "Progress", "Run", "commit", "devices", "differences", "load", "planned", "read_json", "runs", "say", "state", "versions",
    "write_json", "write_text",
]  # fmt: skip

# What --rerun removes, in this order.
OWNED = ("results.json", "error.json", "metrics.jsonl", "metrics", "predictions", "checkpoints", "best", "tensorboard", "points")
FLUSH_SECONDS = 1.0


# ---------------------------------------------------------------- the run


def _check_ours(path: epath.Path) -> None:
    """UserError where a directory holds files of the names that a run writes, but is not a run's."""
    if (path / "config.json").exists():
        if not isinstance(read_json(path / "config.json").get("identity"), dict):
            raise UserError(f"--workdir={path}: holds a config.json without an identity, so it is no run of this program; choose another")
    elif stray := [name for name in OWNED if (path / name).exists()]:
        raise UserError(f"--workdir={path}: holds {stray[0]} but no config.json, so it is no run of this program; choose another")


def make_folder(path, given: str) -> None:
    """Makes a directory where there is none; UserError, which names what gave it, where that cannot be."""
    path = epath.Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{given}={path}: is a file, expected a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{given}={path}: cannot be made: {error.strerror or error}") from error


def _claimed(path: epath.Path, wait: bool) -> Claim:
    make_folder(path, "--workdir")
    _check_ours(path)  # before the claim, which leaves a file
    return Claim(path, wait)


def _content(path: epath.Path, identity: dict, rerun: bool) -> dict:
    """`previous` and `results` of a directory that is claimed. UserError where it holds another run."""
    previous = read_json(path / "config.json") if (path / "config.json").exists() else None
    if previous and (changed := differences(previous.get("identity") or {}, identity)):
        changed = [line for line in changed if line.startswith("stage: ")] or changed  # another stage differs in everything
        shown = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
        raise UserError(f"--workdir={path}: holds another run, which differs in {shown}; choose another directory")
    for name in OWNED if rerun else ():
        _remove(path / name)
    return {"previous": previous, "results": read_json(path / "results.json") if (path / "results.json").exists() else None}


def _remove(target: epath.Path) -> None:
    if target.is_dir():
        target.rmtree()
    else:
        target.unlink(missing_ok=True)


class Run:
    """A claimed run directory. Use it as a context manager: an exception is recorded in error.json and the claim given back.

    Of several processes all open it, and call its methods together; those but process 0 write nothing.

    Attributes:
        path: the directory (epath.Path).
        identity: what the run is (`w2s_jax.config.identity`).
        previous: config.json of an earlier start of this run, or None.
        done: True if results.json is there.
        results: its content, or None.
        writes: whether this process does.
    """

    @classmethod
    def open(cls, workdir, config, identity: dict, rerun: bool = False, wait: bool = False) -> Run:
        """Makes and claims the directory.

        Args:
            workdir: the directory, local or gs://.
            config: the resolved config, written by `start`.
            identity: JSON object; an existing run must have the same, and all processes too.
            rerun: remove the results, metrics, predictions and checkpoints of the same run that are there.
            wait: wait while another process writes the directory, instead of refusing.

        Raises:
            UserError: another process writes it; it holds another run (the message names the keys that differ) or something else; the
                processes of this job read different input.
        """
        path, identity, claims = epath.Path(workdir).expanduser(), plain(identity), []

        def claim() -> dict:
            claims.append(_claimed(path, wait))
            try:
                return _content(path, identity, rerun) | {"identity": identity}
            except BaseException:
                claims.pop().release()
                raise

        found = distributed.once(claim, "open")
        try:
            differ = "; ".join(differences(found["identity"], identity)[:8])
            for process, line in enumerate(distributed.everywhere("identity", differ)):
                if line:
                    raise UserError(f"process {process} of this job reads other input than process 0: {line}; expected the same files")
            return cls(path, config, identity, claims[0] if claims else None, found["previous"], found["results"])
        except BaseException:
            for held_ in claims:
                held_.release()
            raise

    def __init__(self, path: epath.Path, config, identity: dict, claim: Claim | None, previous: dict | None, results: dict | None):
        self.path, self.config, self.identity, self._claim = path, config, identity, claim
        self.previous, self.results, self.writes = previous, results, claim is not None
        self._lines: list[str] = []
        self._flushed = time.monotonic()
        self._file = None  # metrics.jsonl, open for appending
        self._logger: Logger | None = None

    @property
    def done(self) -> bool:
        return self.results is not None

    def start(self, extra: dict | None = None) -> None:
        """Writes config.json: the resolved config, the identity, versions, commit, devices and the keys of `extra`.

        A second start of the same run (after a kill, perhaps on other devices) replaces the file and keeps the list of starts.
        """
        start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(), "pid": os.getpid(), "devices": devices()}
        record = {"config": plain(self.config), "identity": self.identity}
        record |= {"versions": versions(), "commit": commit(), "devices": start["devices"]}
        clash = {*record, "starts"} & {*(extra or {})}
        assert not clash, f"start() writes {clash} itself"
        record |= {**(extra or {}), "starts": [*((self.previous or {}).get("starts") or []), start]}

        def write() -> None:
            _remove(self.path / "error.json")
            write_json(self.path / "config.json", record)
            self._logger = Logger(record["config"].get("logger") or "none", self.path, record["config"])

        distributed.once(write, "start")

    # metrics

    def metrics(self, row: dict) -> None:
        """Appends one line; `row` holds at least `step`. Lines reach the disk each second, and at `flush`."""
        assert "step" in row, "a line of metrics has a step"
        if not self.writes:
            return
        self._lines.append(dumps(row) + "\n")
        if self._logger is not None:
            self._logger.log(row)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Puts every line so far on the disk. Call it before a checkpoint is saved, so that no line before its step can be missing."""
        if not is_object_store(self.path):
            if self._lines:
                if self._file is None:
                    self._file = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
                self._file.write("".join(self._lines))
                self._file.flush()
        elif self._lines:
            parts = self.path / "metrics"
            parts.mkdir(parents=True, exist_ok=True)
            write_text(parts / f"{self._next_part():08d}.jsonl", "".join(self._lines))
        self._lines.clear()
        self._flushed = time.monotonic()

    def _next_part(self) -> int:
        self._part = getattr(self, "_part", len(_metric_parts(self.path)) - 1) + 1
        return self._part

    def resume_metrics(self, step: int) -> list[dict]:
        """Keeps the lines of the steps before `step`, byte for byte, drops the others (a torn last line too) and returns the kept rows.

        Call it before the first `metrics` of an attempt, with 0 where there is no checkpoint.
        """
        assert not self._lines and self._file is None, "resume_metrics comes before the first metrics"
        if not self.writes:
            return []
        kept = [(line, row) for line, row in _metric_lines(self.path) if row["step"] < step]
        text = "".join(line for line, _ in kept)
        if not is_object_store(self.path):
            write_text(self.path / "metrics.jsonl", text)
        else:
            _remove(self.path / "metrics")
            self._part = -1
            if text:
                (self.path / "metrics").mkdir(parents=True, exist_ok=True)
                write_text(self.path / "metrics" / f"{self._next_part():08d}.jsonl", text)
        return [row for _, row in kept]

    # the end

    def finish(self, results: dict) -> None:
        """Writes results.json, the last file of a run: from now on it is done."""
        def write() -> None:
            self.flush()
            _remove(self.path / "error.json")
            write_json(self.path / "results.json", results)

        distributed.once(write, "finish")
        self.results = plain(results)

    def fail(self, error: BaseException) -> None:
        """Writes error.json: what stopped this attempt. The run stays resumable."""
        if not self.writes:
            return
        try:
            self.flush()
            record = {"error": f"{type(error).__name__}: {error}", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                      "host": socket.gethostname(), "pid": os.getpid(), "traceback": traceback.format_exception(error)}  # fmt: skip
            write_json(self.path / "error.json", record)
        except OSError as second:  # a full disk must not hide the first error
            say(f"{self.path}: error.json could not be written: {second}")

    def close(self) -> None:
        """Writes what is buffered and gives the claim back; safe to call twice."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self._logger is not None:
                self._logger.close()
                self._logger = None
            if self._claim is not None:
                self._claim.release()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, Exception):  # Ctrl-C is no failure: the run is stopped
            if not isinstance(error, UserError):
                distributed.settle()
            self.fail(error)
        self.close()


def _metric_parts(path: epath.Path) -> list[epath.Path]:
    folder = path / "metrics"
    return sorted(p for p in folder.iterdir() if p.name.endswith(".jsonl")) if folder.is_dir() else []


def _metric_lines(path: epath.Path) -> list[tuple[str, dict]]:
    """Lines of a run's metrics with their parsed rows; a last line without its newline was torn by a kill and is left out."""
    single = path / "metrics.jsonl"
    files = [single] if single.exists() else _metric_parts(path)
    lines = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                row["step"] + 0
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{file}, line {number}: expected a JSON object with a step, found {line[:80]!r}") from None
            lines.append((line, row))
    return lines


# ---------------------------------------------------------------- reading runs


class LoadedRun:
    """A run directory as Python sees it: `.path`, `.config`, `.record` (all of config.json), `.results` (None if unfinished),
    `.metrics` (a list of dicts), `.predictions(split)`, and on demand `.model()`."""

    def __init__(self, run_dir, open_model=None):
        from ml_collections import ConfigDict

        self._open_model = open_model  # given by `w2s_jax.load`: what restores a model stands on a higher floor

        self.path = epath.Path(run_dir).expanduser()
        if not (self.path / "config.json").exists():
            raise UserError(f"{run_dir}: is not a run directory: it has no config.json")
        self.record = read_json(self.path / "config.json")
        self.config = ConfigDict(self.record.get("config", {}))
        self.results = read_json(self.path / "results.json") if (self.path / "results.json").exists() else None

    def __repr__(self) -> str:
        return f"LoadedRun({os.fspath(self.path)!r}, {'done' if self.results else 'unfinished'})"

    @property
    def metrics(self) -> list[dict]:
        return [row for _, row in _metric_lines(self.path)]

    def model(self):
        """The trained model (`workload.Loaded`: `.model`, `.params`, `.mesh`) from the newest checkpoint."""
        if self._open_model is None:
            raise ValueError("open the run with w2s_jax.load to get its model")
        return self._open_model(self)

    def predictions(self, split: str = "test"):
        """The table predictions/<split>.parquet as a pandas DataFrame."""
        file = self.path / "predictions" / f"{split}.parquet"
        if not file.exists():
            found = sorted(p.stem for p in file.parent.iterdir()) if file.parent.is_dir() else []
            raise UserError(f"{file}: no such predictions; this run has {', '.join(found) or 'none'}")
        return parquet_table(file.read_bytes()).to_pandas(use_threads=False)


def load(run_dir) -> LoadedRun:
    """Opens a run directory for reading (see `LoadedRun`). UserError if it is none."""
    return LoadedRun(run_dir)


def load_done(run_dir, stage: str) -> LoadedRun:
    """A finished run of one stage, opened for reading. UserError where it is something else."""
    source = load(run_dir)
    if source.config.get("stage") != stage:
        raise UserError(f"run={run_dir}: is a run of stage {source.config.get('stage')!r}, expected {stage}")
    if source.results is None:
        raise UserError(f"run={run_dir}: has no results.json yet, expected a finished run")
    return source


def clear(path) -> None:
    """Removes what a run has made, as `rerun` does; nothing where there is no run. UserError where another process writes it."""
    path = epath.Path(path)
    if not (path / "config.json").exists():
        return
    _check_ours(path)
    claim = Claim(path, wait=False)
    try:
        for name in OWNED:
            _remove(path / name)
    finally:
        claim.release()


def state(path) -> str:
    """`done`, `running`, `failed` (error.json), `stopped` (killed, to be resumed) or `absent`."""
    path = epath.Path(path)
    if not path.is_dir():
        return "absent"
    if (path / "results.json").exists():
        return "done"
    if held(path):
        return "running"
    if (path / "error.json").exists():
        return "failed"
    return "stopped" if (path / "config.json").exists() else "absent"


def runs(root, depth: int = 4) -> list[tuple[epath.Path, str]]:
    """Every run directory under `root`, the root itself included, with its state; sorted by path."""
    path = epath.Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"{root}: no such directory")
    found = [(path, state(path))] if any((path / name).exists() for name in ("config.json", "results.json", ".owner")) else []
    if depth:
        for child in sorted(path.iterdir()):
            # What stages write into a run directory holds no runs; model/ has a config.json, but it is a model's.
            if not child.name.startswith(".") and child.name not in (*OWNED, "model") and child.is_dir():
                found += runs(child, depth - 1)
    return found


def planned(root) -> list[epath.Path]:
    """Run directories that ROOT/sweep.json lists, made or not; none where there is no sweep."""
    root = epath.Path(root).expanduser()
    if not (root / "sweep.json").exists():
        return []
    sweep = read_json(root / "sweep.json")
    names = {name for pair in sweep.get("pairs", []) for name in (pair.get("runs") or {}).values() if name}
    return [root / name for name in sorted(names | set(sweep.get("runs", [])))]

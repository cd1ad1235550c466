"""A sweep as SLURM jobs: arrays of runs that need the same, each after those that it reads, and a last job for the report.

`afterany`, not `afterok`: a run that fails must not keep others from starting; each looks for itself whether what it reads is done
(`schedule.check_needs`). FOLDER (ROOT/slurm) holds the scripts, logs/, and jobs.json, which says what was submitted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from w2s_jax import runlog, schedule
from w2s_jax.chips import CHIPS
from w2s_jax.errors import UserError, nearest
from w2s_jax.files import read_json, write_json, write_text
from w2s_jax.graph import Graph, short
from w2s_jax.progress import say
from w2s_jax.schedule import ALL, Array

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
FOLDER = "slurm"  # under the sweep's root


# ---------------------------------------------------------------- what a job asks for


def check(options) -> None:
    """UserError where the keys `config.slurm.*` are not what sbatch takes."""
    if options.time and 0 < seconds(options.time) <= options.grace:  # 0 = no limit
        raise UserError(f"config.slurm.grace: {options.grace} seconds, expected fewer than config.slurm.time={options.time} has")
    if options.mem and not re.fullmatch(r"\d+[KMGT]?", options.mem):
        raise UserError(f"config.slurm.mem: {options.mem!r}, expected a number with K, M, G or T")
    if strange := [word for word in options.options if not str(word).startswith("-")]:
        raise UserError(f"config.slurm.options: {strange[0]!r}, expected options of sbatch such as --qos=long")
    if re.search(r"[\s,]", options.gres):
        raise UserError(f"config.slurm.gres: {options.gres!r}, expected one resource without its number, such as gpu or gpu:a100")
    if options.chip and options.chip not in CHIPS:
        raise UserError(f"config.slurm.chip: {options.chip!r}, expected one of {', '.join(CHIPS)}{nearest(options.chip, CHIPS)}")


def seconds(text: str) -> float:
    """A time limit in SLURM's forms (minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]])."""
    match = TIME.fullmatch(text)
    if not match:
        raise UserError(f"config.slurm.time: {text!r}, expected minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]  # minutes come first
    hours, minutes, secs = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def resources(count: int, options) -> list[str]:
    """Options of sbatch for a run on `count` devices: one process a node, which has all devices of the run there; without a `gres`
    a device is a CPU's, and has a process of its own.
    """
    tasks = processes(count, options)
    count = options.devices if count == ALL else count
    if options.gres:
        here = count // tasks  # devices of a node
        words = [f"--nodes={tasks}", "--ntasks-per-node=1"] + ([f"--gres={options.gres}:{here}"] if here else [])
        in_task = on_node = max(here, 1)
    else:
        words, in_task, on_node = [f"--ntasks={tasks}"], 1, tasks
    if options.cpus:
        words.append(f"--cpus-per-task={options.cpus * in_task}")
    if options.mem:
        number, unit = re.fullmatch(r"(\d+)([KMGT]?)", options.mem).groups()
        words.append(f"--mem={int(number) * on_node}{unit}")
    return words


def processes(count: int, options) -> int:
    """Processes of a run on `count` devices. UserError: more devices than a node has, and no multiple of them."""
    count = options.devices if count == ALL else count
    if not options.gres:
        return max(count, 1)
    if count > options.devices and count % options.devices:
        raise UserError(f"config.slurm.devices: a run's mesh takes {count} devices, expected a multiple of the {options.devices} of a node")
    return max(math.ceil(count / options.devices), 1)


def memory(options) -> int:
    """Bytes that a program may use of a device; 0 = not known."""
    return CHIPS[options.chip].memory if options.chip else 0


def command(array: Array, options, folder: Path, script: Path, title: str, after=()) -> list[str]:
    """The words of the sbatch call for an array; `after`: ids of jobs that must have ended, however they did."""
    return ["sbatch", "--parsable", f"--job-name={title}", f"--output={_pattern(folder / 'logs' / script.stem)}-%A_%a.out",
            f"--array=0-{len(array.runs) - 1}" + (f"%{options.at_once}" if options.at_once else ""),
            *resources(array.devices, options), f"--signal=TERM@{options.grace}", *_common(options, after), str(script)]  # fmt: skip


def _common(options, after) -> list[str]:
    words = [f"--{key}={options[key]}" for key in ("partition", "account", "time") if options[key]]
    words += ["--requeue", "--open-mode=append", f"--chdir={os.getcwd()}"]
    if after:
        words.append(f"--dependency=afterany:{':'.join(after)}")
    return words + [str(word) for word in options.options]


def _pattern(path) -> str:
    """A path inside `--output`, where % begins a replacement."""
    return str(path).replace("%", "%%")


# ---------------------------------------------------------------- the scripts


def script(root, runs, options, about: str) -> str:
    """The script of an array job: task i makes the run `runs[i]`."""
    made = " ".join([*map(shlex.quote, schedule.program()), shlex.quote(f"--config={epath.Path(root) / 'planned'}/") + '"$run".json',
                     shlex.quote(f"--workdir={epath.Path(root)}/") + '"$run"'])  # fmt: skip
    return "\n".join([*_head(options, about), "runs=(", *(f"  {shlex.quote(run)}" for run in runs), ")",
                      'run="${runs[$SLURM_ARRAY_TASK_ID]}"', 'echo "$(date "+%F %T") $run on $(hostname), job $SLURM_JOB_ID" >&2', "",
                      _job(), "", f"w2s_job {options.restarts} {made}", ""])  # fmt: skip


def report_script(root, options) -> str:
    """The script of the last job: the state of every run, then the report on those that are done."""
    program = shlex.join(schedule.program())
    return "\n".join([*_head(options, f"The report on the sweep {root}."), f"{program} status {shlex.quote(str(root))}",
                      f"{program} --config=report {shlex.quote(f'--workdir={root}')}", ""])


def _head(options, about: str) -> list[str]:
    lines = ["#!/bin/bash", *(f"# {line}" for line in about.splitlines())]
    if options.setup:
        lines += ["{", options.setup, "} || { echo 'error: config.slurm.setup failed' >&2; exit 2; }"]
    if path := schedule.python_path():
        lines.append(f"export PYTHONPATH={shlex.quote(path)}")
    return lines


def _job() -> str:
    return (Path(__file__).parent / "job.sh").read_text().split("\n", 1)[1].strip()


# ---------------------------------------------------------------- what is submitted


@dataclasses.dataclass(frozen=True)
class Jobs:
    """What jobs.json records: a list of jobs in the order of their submission, each with `id`, `title`, `script`, `runs` (by task; of
    the report none), `log` (to which a task adds `_<task>.out`, the report `.out`) and `command`."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "jobs.json"

    def read(self) -> list[dict]:
        return read_json(self.file)["jobs"] if self.file.exists() else []

    def add(self, job: dict) -> None:
        write_json(self.file, {"jobs": [*self.read(), job]})

    def active(self) -> dict[tuple[str, int | None], str]:
        """(job id, task or None) -> state, of those that the queue still has.

        Raises:
          UserError: the queue cannot be asked.
        """
        jobs = {job["id"]: job for job in self.read()}
        if not jobs:
            return {}
        found = {}
        for line in _ask("squeue", "--noheader", "--array", "--me", "--format=%F|%K|%T|%j").splitlines():
            job, task, state, title = line.strip().split("|", 3)
            if job in jobs and jobs[job]["title"] == title:  # ids begin again where a cluster is set up anew
                found[job, int(task) if task.isdigit() else None] = state
        return found

    def runs(self) -> dict[str, dict]:
        """Of every run that was submitted the newest `job` (id_task), its `log`, and its `state` in the queue ("" = no longer there)."""
        active, out = self.active(), {}
        for job in self.read():
            for task, run in enumerate(job["runs"]):
                out[run] = {"job": f"{job['id']}_{task}", "state": active.get((job["id"], task), ""),
                            "log": f"{job['log']}_{task}.out"}
        return out


def _ask(*words: str) -> str:
    """The output of one of SLURM's programs. UserError where it is missing or fails."""
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(f"config.executor: 'slurm', but there is no {words[0]} on PATH; expected a login node of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: no answer in two minutes; is the cluster's controller up?") from None
    if answer.returncode:
        raise UserError(f"{words[0]}: {answer.stderr.strip() or f'exit code {answer.returncode}'} (from: {shlex.join(words)})")
    return answer.stdout


def submit(graph: Graph, todo, work: dict[str, float], need: dict[str, int], config, several, dry_run: bool = False,
           begin: Callable[[list[str]], None] | None = None) -> dict[str, str]:
    """Submits the runs `todo` that are not in the queue already, and the report.

    Args:
      work, need: how long each takes compared with the others, and the devices that it takes.
      several: the stages that run in several processes.
      begin: called with the runs that are about to be submitted, once everything is known to fit.

    Returns the job of every run that is queued now. UserError: no SLURM here, or sbatch refuses; what was submitted before stays.
    """
    options, root = config.slurm, graph.root
    folder = schedule.folder(root, config.logs, FOLDER)
    if not dry_run:
        if not shutil.which("sbatch"):
            raise UserError("config.executor: 'slurm', but there is no sbatch on PATH; expected a login node of a SLURM cluster")
        runlog.make_folder(folder / "logs", "config.logs")
    jobs = Jobs(folder)
    with contextlib.nullcontext() if dry_run else _alone(folder):
        found = {run: where for run, where in jobs.runs().items() if where["state"] and run in graph.nodes}
        stale = _stale(graph, [name for name in todo if name not in found], found)
        if stale and not dry_run:
            _ask("scancel", *(found[run]["job"] for run in stale))
        queued = {run: where["job"] for run, where in found.items() if run not in stale}
        number = 1 + max((int(Path(job["script"]).name.split("-")[0]) for job in jobs.read()), default=0)
        left = [name for name in todo if name not in queued]
        if already := [name for name in todo if name in queued]:
            say(f"in the queue already: {len(already)} run{'s' * (len(already) > 1)}")
        arrays = schedule.arrays(graph, left, work, need, queued)
        for array in arrays:  # all of them fit before one is submitted
            if processes(array.devices, options) > 1 and array.stage not in several:
                raise UserError(f"{array.runs[0]}: its mesh takes {processes(array.devices, options)} processes, but the stage "
                                f"{array.stage} runs in one; expected config.slurm.devices={array.devices} or more, or a smaller mesh")
        ids: dict[str, str] = {}
        title = f"w2s-{short(str(root))}"
        if not dry_run:
            if begin:
                begin(left)
            schedule.write_plans(graph, left)
        for array in arrays:
            before = [queued[p] for name in array.runs for p in graph.nodes[name].parents if p in queued and p not in left]
            after = [*(ids[name] for name in array.after), *dict.fromkeys(before)]
            file = folder / f"{number}-{array.name}.sh"
            text = script(root, array.runs, options, f"Part of the sweep {root}: runs of the stage {array.stage}, one a task of the array.")
            words = command(array, options, folder, file, f"{title}-{array.stage}", after)
            what = f"{len(array.runs)} run{'s' * (len(array.runs) > 1)} of {array.stage}, {_devices(array.devices, options)} each"
            what += f", after {', '.join(after)}" if after else ""
            ids[array.name] = _submit(jobs, words, file, text, array.runs, what, dry_run)
            queued |= {run: f"{ids[array.name]}_{task}" for task, run in enumerate(array.runs)}
        if arrays and config.report:
            file = folder / f"{number}-report.sh"
            after = list(dict.fromkeys(job.split("_")[0] for job in queued.values()))
            words = ["sbatch", "--parsable", f"--job-name={title}-report", f"--output={_pattern(folder / 'logs' / file.stem)}-%j.out",
                     "--ntasks=1", *_common(options, after), str(file)]  # fmt: skip
            ids["report"] = _submit(jobs, words, file, report_script(root, options), (), f"the report, after {', '.join(after)}", dry_run)
    if ids and not dry_run:
        say(f"how it goes: w2s status {shlex.quote(str(root))}; logs: {folder / 'logs'}; cancel all: "
            f"scancel {' '.join(dict.fromkeys([job.split('_')[0] for job in queued.values()] + list(ids.values())))}")
    return queued


def _stale(graph: Graph, left: list[str], found: dict[str, dict]) -> list[str]:
    """Runs that wait in the queue for an earlier attempt at what is about to be submitted again: they would start too early."""
    again, stale = set(left), []
    for name, node in graph.nodes.items():
        if name in found and found[name]["state"] == "PENDING" and again.intersection(node.parents):
            again.add(name)
            stale.append(name)
    return stale


@contextlib.contextmanager
def _alone(folder: Path):
    """One process at a time submits a sweep. UserError where another does."""
    import filelock

    try:
        with filelock.FileLock(folder / ".submit.lock", timeout=0.5):
            yield
    except filelock.Timeout:
        raise UserError(f"{folder}: another process submits this sweep; wait for it") from None


def _devices(count: int, options) -> str:
    return {0: "no device", 1: "one device", ALL: f"all {options.devices} devices of a node"}.get(count, f"{count} devices")


def _submit(jobs: Jobs, words: list[str], file: Path, text: str, runs, what: str, dry_run: bool) -> str:
    if dry_run:
        print(f"{shlex.join(words)}    # {what}")
        return f"<{file.stem}>"
    write_text(file, text)
    job = _ask(*words).strip().split(";")[0]
    title = next(word for word in words if word.startswith("--job-name=")).split("=", 1)[1]
    jobs.add({"id": job, "title": title, "script": str(file), "runs": list(runs), "log": f"{jobs.folder / 'logs' / file.stem}-{job}",
              "command": words, "time": time.time()})
    say(f"job {job}: {what}")
    return job

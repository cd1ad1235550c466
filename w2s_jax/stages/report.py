"""Stage `report`: a sweep's runs as tables, plots and one page.

Writes ROOT/report/: report.md, a csv file of every table (`tables.FRAMES`), the plots {accuracy, auroc, pgr, misfit,
reliability}.{png, svg}; and prints the tables.
Nothing is kept between calls: a report is always made from the runs that are there.
"""

from __future__ import annotations

import os
import threading

from etils import epath

from w2s_jax import comparison, plots, runlog, tables
from w2s_jax import pairs as pairs_lib
from w2s_jax.errors import UserError
from w2s_jax.metrics import REPLICATES

FEWEST = 40  # bootstrap draws of which one lies beyond each end of a 95% interval


def run(config, workdir, *, rerun: bool = False, **options) -> dict:
    """Makes the report of the sweep in `config.root` (or `workdir`), or of the runs `config.weak`, `.ceiling`, `.student`.

    Returns the lists of `comparison.Comparison` under their names, and `report`, the folder written. `rerun` changes nothing.
    UserError where there is nothing to report.
    """
    del rerun, options
    if config.replicates < FEWEST:
        raise UserError(f"config.replicates={config.replicates}: expected at least {FEWEST}, for a 95% interval")
    if config.seed < 0:
        raise UserError(f"config.seed={config.seed}: expected 0 or more")
    if config.into:
        _around(config.into)
    root = config.root or workdir
    pairs = _own_runs(config)
    if not root:
        raise UserError("--workdir: is not set; a report needs the sweep's root")
    found = _compare(root, pairs, config.seed, config.replicates)
    folder = epath.Path(workdir or root).expanduser() / "report"
    text = write(found, folder, title=f"Weak-to-strong report: {epath.Path(root).expanduser().name}", replicates=config.replicates)
    print(_printed(text), end="", flush=True)
    runlog.say(f"written: {folder}")
    if config.into:
        before, after = _around(config.into)
        runlog.write_text(epath.Path(config.into), f"{before}\n\n{tables.excerpt(found)}\n\n{after}")
        runlog.say(f"written: {config.into}")
    return {**vars(found), "report": os.fspath(folder)}


LINES = 60  # of a section by seed that a terminal is given; longer ones stand in report.md alone


def _printed(text: str) -> str:
    """report.md without its plots, and without the tables by seed where they are long."""
    sections = "\n\n".join(part for part in text.split("\n\n") if not part.startswith("![")).split("\n## ")
    return "\n## ".join("By seed\n\nIn report.md: the tables are long.\n" if section.startswith("By seed") and section.count("\n") > LINES
                        else section for section in sections)


BEGIN, END = "<!-- report -->", "<!-- end of report -->"


def _around(file: str) -> tuple[str, str]:
    """What stands before and after the place for tables in a text file, the marks included."""
    path = epath.Path(file)
    text = path.read_text() if path.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"into={file}: expected a text file with one line {BEGIN} and, after it, one line {END}")
    return text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END):]


def table(root, name: str = "table", seed: int = 0, replicates: int = REPLICATES):
    """A table of the report as a pandas DataFrame; the columns are those of `<name>.csv`. `x_lo` and `x_hi`: 95% interval of x.

    Args:
      root: the sweep's root.
      name: what is wanted. All but the last two have task, weak_model, strong_model, method, seeds.
        table: a row a metric (accuracy | auroc): metric, n_test, n_groups, majority_baseline; weak, student, ceiling, gap
          (ceiling - weak), gain (student - weak), pgr, each with interval; undefined (share of bootstrap replicates without
          a positive gap), gap_clear.
        by_seed: the same, one seed a row.
        agreement: with the supervisor, and inherited errors (`analyses.agreement`).
        misfit: to the supervisor, and the gain in the same loss (`analyses.misfit`).
        calibration: ECE and overconfidence (`analyses.calibration`) of weak, label, student, ceiling.
        reliability: bins of the reliability diagrams, a row a task, series and bin.
        tests: methods against their baselines and controls (`significance.paired_tests`).
      seed, replicates: of the bootstrap.
    """
    if name not in tables.FRAMES:
        raise UserError(f"table: {name!r}, expected one of {', '.join(tables.FRAMES)}")
    return tables.frame(_compare(root, None, seed, replicates), name)


def write(found: comparison.Comparison, folder, *, title: str, replicates: int) -> str:
    """Writes the files of a report into `folder` and returns the text of report.md, which is written last."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    drawings = {m: (plots.quality, [r for r in found.rows if r["metric"] == m]) for m in tables.TITLES}
    drawings |= {"pgr": (plots.pgr, found.rows), "misfit": (plots.misfit, found.misfit)}
    drawings["reliability"] = plots.reliability, found.reliability
    for name, (draw, rows) in drawings.items():
        drawn = draw(rows) if rows else {}
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)  # an older report's plot must not stand beside newer numbers
            if drawn:
                _write_bytes(folder / f"{name}.{kind}", drawn[kind])
                images[name] = f"{name}.png"
    for name in tables.FRAMES:
        runlog.write_text(folder / f"{name}.csv", tables.frame(found, name).to_csv(index=False))
    text = tables.report(found, title, images, replicates)
    runlog.write_text(folder / "report.md", text)
    return text


def _compare(root, pairs, seed: int, replicates: int) -> comparison.Comparison:
    root = epath.Path(root).expanduser()
    if pairs is None:
        pairs = pairs_lib.read_pairs(root)
    with runlog.Progress(len({p["task"] for p in pairs}), label="report", unit="task") as bar:
        return comparison.compare(root, pairs, seed=seed, replicates=replicates, progress=lambda: bar.update(1))


def _own_runs(config) -> list[dict] | None:
    """The pair named by the keys weak, ceiling and student; None where none of them is set."""
    given = {role: config[role] for role in ("weak", "ceiling", "student") if config[role]}
    if not given:
        if config.label:
            raise UserError(f"label={config.label}: needs weak, ceiling and student beside it")
        return None
    if lacks := [role for role in ("weak", "ceiling", "student") if role not in given]:
        raise UserError(f"{lacks[0]}: is not set, but {', '.join(given)} is; weak, ceiling and student go together")
    return pairs_lib.pair_of_runs(label=config.label, **given)


def _write_bytes(path: epath.Path, content: bytes) -> None:
    """As runlog.write_text: readers see the old file or the new one."""
    if runlog.is_object_store(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

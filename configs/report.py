"""Report on a sweep: accuracy, AUROC and PGR with intervals, methods compared, agreement, inherited errors, misfit, calibration.

    python -m w2s_jax.main --config=configs/report.py --workdir=runs/sweep

Writes report/ under the workdir: report.md, {table,by_seed,agreement,misfit,calibration,reliability,tests}.csv,
{accuracy,auroc,pgr,misfit,reliability}.{png,svg}, and prints the tables. A sweep that is not finished is reported as far as
it is, and the runs that lack are listed. Three runs that no sweep made are compared with

    python -m w2s_jax.main --config=report --config.weak=runs/a --config.ceiling=runs/b --config.student=runs/c --workdir=runs/abc
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "report"  # which stage of w2s_jax runs this config
    c.seed = 0  # of the bootstrap
    c.root = ""  # the sweep's root; empty = the workdir
    c.weak = ""  # run folder of the weak supervisor, to compare three runs instead of a sweep
    c.ceiling = ""  # run folder of the strong ceiling
    c.student = ""  # run folder of the strong student
    c.label = ""  # run folder of the weak labels (optional: their accuracy is reported)
    c.replicates = 2000  # bootstrap draws
    c.into = ""  # a text file: also put the accuracy tables between its lines <!-- report --> and <!-- end of report -->

    if arg == "runlocal":
        c.replicates = 200
    elif arg:
        raise ValueError(f"configs/report.py takes ':runlocal', got ':{arg}'")
    return c

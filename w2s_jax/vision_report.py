"""The report of a vision experiment: tables, plots and a sheet of images, from numbers that are there already.

`tables` and `plots` say the same of sweeps of language models; the words and the style are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from etils import epath

from w2s_jax import gallery, metrics, tables, vision_plots
from w2s_jax.files import write_bytes, write_text
from w2s_jax.gallery import Picture
from w2s_jax.tables import markdown, number, percent, with_interval

__all__ = ["Picture", "write"]

FRAMES = ("table", "by_seed", "agreement", "epochs", "noise", "l2", "images")  # each is a csv file where there is anything in it
PLOTS = ("accuracy", "top5", "epochs", "noise", "l2")  # each a png and a svg file
SHEET = "images.png"

ROLES = """Weak: {weak}, as it is. Ceiling: {strong} with ground truth. Student: {strong} with the weak model's labels, in the same way.
PGR = (student - weak) / (ceiling - weak). {dataset}: {n_train} images for training, {n_test} for the test, {n_classes} classes{apart};
seeds {seeds}."""
DRAWN = "test images (one seed: its luck is not in the intervals)", "test images, then seeds"
FEW_SEEDS = " (so few seeds understate the spread between them)"
EPOCHS_NOTE = """Thick lines are means over the seeds, thin ones the seeds. Agreement that rises while accuracy falls is a student that
learns its supervisor's errors. "Highest" is known only by ground truth: no result, but what stopping at the right time would give."""
AGREEMENT_NOTE = """On the test images, all of them and split by the weak model being right. Near-equal columns mean imitation, errors
included; a student that knows better agrees less where the weak model is wrong."""
NOISE_NOTE = """Probes on the true labels after a share of them was replaced by another class, drawn evenly. Above the dashed line a probe
is better than its labels; the weak model's errors are not drawn evenly, and are harder to see through than these."""
L2_NOTE = """Probes solved to convergence at each penalty{first}. The penalty is chosen by the loss on held-out labels of the kind that is
trained on: for the student no ground truth takes part. Agreement is with the weak model on the test images."""
SHEET_NOTE = """Test images, with what the weak model and its student ({method}, seed {seed}) said and the probabilities of these answers.
No random sample: in turns, as long as there are any, the student alone is right, the weak model alone is right, neither is, both are."""


def write(folder, results: dict, pictures: Sequence[Picture] = ()) -> list[epath.Path]:
    """Writes report.md, a csv file of every table (FRAMES), the plots (PLOTS) and images.png into `folder`, report.md last.

    Args:
      folder: made where it does not exist; files of an older report that this one does not have are removed.
      results: `weak` {name, accuracy, accuracy_ci, top5, top5_ci}; `strong`, `dataset` (names); `n_train`, `n_test`, `n_classes`,
        `seeds`; `n_weak` (images of a weak model's own, if any); `replicates` of the bootstrap (default: metrics.REPLICATES);
        `methods`, one dict a method: `method`, all of `metrics.pgr` on accuracy, `top5` (the same on top-5 accuracy, or None),
        `agreement` (`metrics.agreement`), `by_seed` (one dict a seed: `seed` and `metrics.pgr`), `epochs` ({accuracy, agreement,
        ceiling}: lists of epochs, one a seed; or None); `noise`, one dict a level: level, label_accuracy, accuracy (one a seed),
        accuracy_ci; `l2`: name of a label set -> its path, dicts of l2, heldout_loss, accuracy, agreement, chosen. top5, agreement,
        epochs, noise and l2 may be absent.
      pictures: at most gallery.MOST.
    Returns:
      the files written.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written, files = [], {}
    for name, drawn in _plots(results).items():
        files |= {f"{name}.{kind}": content for kind, content in drawn.items()}
    if pictures:
        files[SHEET] = gallery.draw(pictures)
    for name, rows in _frames(results, pictures).items():
        files[f"{name}.csv"] = _csv(rows)
    text = _text(results, set(files))
    for name in (*(f"{p}.{kind}" for p in PLOTS for kind in ("png", "svg")), *(f"{f}.csv" for f in FRAMES), SHEET):
        if name in files:
            write_bytes(folder / name, files[name])
            written.append(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # an older report's figure must not stand beside newer numbers
    write_text(folder / "report.md", text)
    return [*written, folder / "report.md"]


def _plots(results: dict) -> dict[str, dict[str, bytes]]:
    methods, drawn = results["methods"], {}
    drawn["accuracy"] = vision_plots.quality(methods, "Accuracy")
    if top := _top5(methods):
        drawn["top5"] = vision_plots.quality(top, "Top-5 accuracy")
    if by_epoch := [m for m in methods if m.get("epochs")]:
        drawn["epochs"] = vision_plots.epochs(by_epoch, results["weak"]["accuracy"])
    if results.get("noise"):
        drawn["noise"] = vision_plots.noise(results["noise"])
    if results.get("l2"):
        drawn["l2"] = vision_plots.l2(results["l2"])
    return drawn


def _top5(methods: Sequence[dict]) -> list[dict]:
    return [{"method": m["method"], **m["top5"]} for m in methods if m.get("top5")]


def _frames(results: dict, pictures: Sequence[Picture]) -> dict[str, list[dict]]:
    """The rows of every csv file that has any; numbers are not rounded."""
    methods = results["methods"]
    common = {"dataset": results["dataset"], "weak_model": results["weak"]["name"], "strong_model": results["strong"]}
    keys = ("weak", "student", "ceiling", "gap", "gain", "pgr")

    def numbers(row: dict) -> dict:
        out = {}
        for key in keys:
            if key in row:
                out[key] = row[key]
                out[f"{key}_lo"], out[f"{key}_hi"] = row.get(f"{key}_ci") or (None, None)
        return out | {k: row[k] for k in ("undefined", "gap_clear") if k in row}

    common |= {"seeds": " ".join(map(str, results["seeds"])), "n_test": results["n_test"]}
    by_metric = (("accuracy", methods), ("top5", _top5(methods)))
    frames = {
        "table": [{**common, "method": r["method"], "metric": metric, **numbers(r)} for metric, rows in by_metric for r in rows],
        "by_seed": [{"method": m["method"], "seed": r["seed"], **numbers(r)} for m in methods for r in m["by_seed"]],
        "agreement": [{"method": m["method"], **m["agreement"]} for m in methods if m.get("agreement")],
        "epochs": [{"method": m["method"], "seed": seed, "epoch": i + 1, **{k: _at(v, s, i) for k, v in m["epochs"].items()}}
                   for m in methods if m.get("epochs") for s, seed in enumerate(results["seeds"])
                   for i in range(max(len(v[s]) for v in m["epochs"].values() if v))],
        "noise": [{"level": r["level"], "label_accuracy": r["label_accuracy"], "seed": seed, "accuracy": value,
                   "mean_lo": (r["accuracy_ci"] or (None, None))[0], "mean_hi": (r["accuracy_ci"] or (None, None))[1]}
                  for r in results.get("noise") or [] for seed, value in zip(results["seeds"], r["accuracy"])],
        "l2": [{"labels": name, **r} for name, path in (results.get("l2") or {}).items() for r in path],
        "images": [p._asdict() | {"image": i} for i, p in enumerate(pictures)],
    }  # fmt: skip
    return {name: rows for name, rows in frames.items() if rows}


def _at(values, seed: int, epoch: int):
    return values[seed][epoch] if values and epoch < len(values[seed]) else None


def _csv(rows: list[dict]) -> bytes:
    import pandas

    return pandas.DataFrame(rows).to_csv(index=False).encode()


def _text(results: dict, files: set[str]) -> str:
    """The text of report.md; only plots that are in `files` are linked."""
    r, weak, methods = results, results["weak"], results["methods"]
    seeds = len(r["seeds"])

    def image(name: str) -> list[str]:
        return [f"![{name}]({name}.png)"] if f"{name}.png" in files else []

    drawn = DRAWN[seeds > 1] + (FEW_SEEDS if 1 < seeds < 5 else "")
    apart = f", {r['n_weak']:,} images apart for the weak model" if r.get("n_weak") else ""
    roles = ROLES.format(apart=apart, weak=weak["name"], strong=r["strong"], dataset=r["dataset"], seeds=" ".join(map(str, r["seeds"])),
                         **{k: f"{r[k]:,}" for k in ("n_train", "n_test", "n_classes")})
    parts = [f"# Weak-to-strong report: {weak['name']} -> {r['strong']} on {r['dataset']}", roles,
             tables.INTERVALS_NOTE.format(replicates=r.get("replicates", metrics.REPLICATES), seeds=drawn)]
    if care := _warnings(methods):
        parts += ["## Read with care", "\n".join(f"- {line}" for line in care)]
    parts += ["## Accuracy", _quality(methods), *image("accuracy"), _recovered(methods)]
    if top := _top5(methods):
        parts += ["## Top-5 accuracy", "The share of the test images whose class is among the five likeliest.", _quality(top),
                  *image("top5"), _recovered(top)]
    if any(m.get("agreement") for m in methods):
        parts += ["## Agreement with the supervisor", AGREEMENT_NOTE, _agreement([m for m in methods if m.get("agreement")])]
    if "epochs.png" in files:
        parts += ["## By epoch", EPOCHS_NOTE, *image("epochs"), _by_epoch([m for m in methods if m.get("epochs")])]
    if r.get("noise"):
        parts += ["## Label noise", NOISE_NOTE, *image("noise"), _noise(r["noise"])]
    if r.get("l2"):
        first = f"; the weak labels are those of seed {r['seeds'][0]}" if seeds > 1 else ""
        parts += ["## L2 penalty", L2_NOTE.format(first=first), *image("l2"), _l2(r["l2"])]
    if SHEET in files:
        parts += ["## Images", SHEET_NOTE.format(method=methods[0]["method"], seed=r["seeds"][0]), *image("images")]
    if seeds > 1:
        parts += ["## By seed", "One seed a row; its intervals come from the test images alone.", _by_seed(methods)]
    return "\n\n".join(parts) + "\n"


def _warnings(methods: Sequence[dict]) -> list[str]:
    lines = []
    for m in methods:
        for row, measure in ((m, "accuracy"), (m.get("top5"), "top-5 accuracy")):
            if row is None or row["gap_clear"]:
                continue
            why = "no gap: the ceiling is not above the weak model" if row["pgr"] is None else "gap too small for this many test images"
            then = "undefined" if row["pgr"] is None else "withheld" if row["pgr_ci"] is None else "next to meaningless"
            lines.append(f"{m['method']}, {measure}: {why} ({with_interval(row['gap'], row['gap_ci'])}); its PGR is {then}.")
    return lines


def _quality(rows: Sequence[dict]) -> str:
    return markdown(("method", "weak", "student", "ceiling"),
                    [[r["method"], *(with_interval(r[k], r[f"{k}_ci"]) for k in ("weak", "student", "ceiling"))] for r in rows])


def _recovered(rows: Sequence[dict]) -> str:
    return markdown(("method", "gap", "student - weak", "PGR", "gap <= 0"),
                    [[r["method"], *(with_interval(r[k], r[f"{k}_ci"]) for k in ("gap", "gain")), tables.pgr(r), percent(r["undefined"])]
                     for r in rows])


def _by_seed(methods: Sequence[dict]) -> str:
    return markdown(("method", "seed", "weak", "student", "ceiling", "gap", "PGR", "gap <= 0"),
                    [[m["method"], r["seed"], *(number(r[k]) for k in ("weak", "student", "ceiling")), with_interval(r["gap"], r["gap_ci"]),
                      tables.pgr(r), percent(r["undefined"])] for m in methods for r in m["by_seed"]])


def _agreement(methods: Sequence[dict]) -> str:
    """The columns' images are the same for every method, unless seeds have supervisors of their own."""
    return markdown(("method", "all", "weak right", "weak wrong", "images, weak right", "weak wrong"),
                    [[m["method"], *(number(m["agreement"][k]) for k in ("all", "right", "wrong")),
                      *(f"{m['agreement'][k]:,}" for k in ("n_right", "n_wrong"))] for m in methods])


def _by_epoch(methods: Sequence[dict]) -> str:
    """First, best (by accuracy, over the seeds' mean) and last epoch of each method."""
    body = []
    for m in methods:
        accuracy, agreement = ([math.fsum(column) / len(column) for column in zip(*m["epochs"][k])] for k in ("accuracy", "agreement"))
        best = accuracy.index(max(accuracy))
        body.append([m["method"], number(accuracy[0]), f"{number(accuracy[best])} ({best + 1})", number(accuracy[-1]), number(agreement[0]),
                     number(agreement[-1])])
    return markdown(("method", "accuracy, epoch 1", "highest (epoch)", "last", "agreement, epoch 1", "last"), body)


def _noise(levels: Sequence[dict]) -> str:
    return markdown(("labels replaced", "accuracy of the labels", "accuracy of the probe"),
                    [[percent(r["level"]), number(r["label_accuracy"]),
                      with_interval(math.fsum(r["accuracy"]) / len(r["accuracy"]), r["accuracy_ci"])]
                     for r in sorted(levels, key=lambda r: r["level"])])


def _l2(paths: dict[str, Sequence[dict]]) -> str:
    body = []
    for name, path in paths.items():
        for r in sorted(path, key=lambda r: -r["l2"]):
            values = [number(r.get(k)) for k in ("heldout_loss", "accuracy", "agreement")]
            body.append([name, f"{r['l2']:.3g}", *values, "chosen" if r["chosen"] else ""])
    return markdown(("labels", "l2", "held-out loss", "accuracy", "agreement", ""), body)

"""The plots of a report: dots with error bars, a panel a task, a block of lines a pair of models.

Okabe and Ito's colours, then Tol's, which colour-blind readers tell apart, and a marker of its own for every series, so that
the plots also work in print. Drawn on `matplotlib.figure.Figure` directly: no display, no global state, the same bytes every time.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence

from w2s_jax.config import LOSS_ARGS
from w2s_jax.pairs import ORACLE
from w2s_jax.tables import TITLES, number

LINE = 0.19  # inches between two lines of a block
WEAK, CEILING = ("0.5", "s"), ("black", "D")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#661100", "#117733")
MARKERS = ("o", "^", "v", "P", "X", "<", ">", "p", "h", "*", "d")
# Places among colours and markers of the methods beside the losses, which come first in the order of their registry.
USUAL = {"xent s2s 1": 14, "xent s2s 2": 15, "xent s2s 3": 16, "xent bootstrap": 17, "probe logistic": 18, "probe knn": 19,
         "xent filter knn": 20, "xent filter topofilter": 21, "xent relabel knn": 12, "xent relabel topofilter": 10,
         "zero-shot": 23, "few-shot": 25}  # fmt: skip
CONTROL = " random"  # what the name of a random control ends in
EDGES = (-1.0, 2.0)  # PGR beyond them is drawn at the edge, with its value


def quality(rows: Sequence[dict]) -> dict[str, bytes]:
    """Weak, students and ceiling of every pair, with intervals: {"png": bytes, "svg": bytes}.

    `rows`: of a Comparison, all of one metric. The dotted line is what needs no model: the majority class, or chance for AUROC.
    """
    metric, methods = rows[0]["metric"], _methods(rows)
    styles = styles_of(methods)
    blocks, height = _blocks(rows), len(methods) + 3  # weak, students, ceiling, a free line
    figure, axes = _canvas(blocks, height, columns=1)
    for (task, pairs), (axis,) in zip(blocks.items(), axes, strict=True):
        for top, found in zip(range(0, height * len(pairs), height), pairs.values(), strict=True):
            ends = max(found.values(), key=lambda r: len(r["seeds"]))  # methods may lack seeds; the ends then show the most complete
            draw_dot(axis, ends["weak"], ends["weak_ci"], top, WEAK)
            for line, method in enumerate(methods, top + 1):
                if method in found:
                    draw_dot(axis, found[method]["student"], found[method]["student_ci"], line, styles[method])
            draw_dot(axis, ends["ceiling"], ends["ceiling_ci"], top + height - 2, CEILING)
        baseline = ends["majority_baseline"] if metric == "accuracy" else 0.5
        axis.axvline(baseline, color="0.5", linestyle=":", linewidth=1.2, zorder=1)
        _finish(axis, task, list(pairs), height, f"{TITLES[metric]} on the test set")
    handles = [legend_line(WEAK, "weak"), *(legend_line(styles[x], f"student, {x}") for x in methods), legend_line(CEILING, "ceiling"),
               legend_guide(":", "majority class" if metric == "accuracy" else "chance")]
    return render(figure, handles)


def pgr(rows: Sequence[dict]) -> dict[str, bytes]:
    """PGR of every pair and method with its interval, the gap beside it, a column a metric: {"png": bytes, "svg": bytes}.

    Hollow: the gap's interval includes 0. Where PGR is undefined or withheld (`metrics.pgr`), the line says so instead.
    """
    metrics, methods = [m for m in TITLES if any(r["metric"] == m for r in rows)], _methods(rows)
    styles = styles_of(methods)
    blocks, height = _blocks(rows), max(len(methods), 2) + 1
    figure, axes = _canvas(blocks, height, columns=len(metrics))
    for (task, pairs), row_of_axes in zip(blocks.items(), axes, strict=True):
        for metric, axis in zip(metrics, row_of_axes, strict=False):
            here = [r for r in rows if r["task"] == task and r["metric"] == metric]
            if not here:  # a task without AUROC
                axis.set_axis_off()
                continue
            low, high = pgr_range(here)
            labels = []
            for index, name in enumerate(pairs):
                found = {r["method"]: r for r in here if _name(r) == name}
                ends = max(found.values(), key=lambda r: len(r["seeds"]))
                ci = ends["gap_ci"]
                labels.append(f"{name}\ngap {number(ends['gap'])}" + (f" [{number(ci[0])}, {number(ci[1])}]" if ci else ""))
                for line, method in enumerate(methods, index * height):
                    if method in found:
                        draw_pgr(axis, found[method], line, styles[method], low, high)
            axis.axvline(0, color="0.55", linewidth=1.2, zorder=1)
            axis.axvline(1, color="0.55", linewidth=1.2, linestyle="--", zorder=1)
            axis.set_xlim(low, high)
            axis.locator_params(axis="x", nbins=6)
            _finish(axis, task, labels, height, f"PGR by {'AUROC' if metric == 'auroc' else metric}")
    handles = [*(legend_line(styles[x], x) for x in methods), legend_guide("-", "weak"), legend_guide("--", "ceiling")]
    if any(r["pgr_ci"] and not r["gap_clear"] for r in rows):
        handles.insert(len(methods), legend_line(("black", "o"), "hollow: gap's interval includes 0", hollow=True))
    return render(figure, handles)


def misfit(rows: Sequence[dict]) -> dict[str, bytes]:
    """Predicted against observed gain of every pair and method, in squared error and in cross-entropy: {"png": bytes, "svg": bytes}.

    `rows`: `Comparison.misfit`. On the diagonal the student gains what its misfit to the supervisor predicts.
    """
    from matplotlib.figure import Figure

    methods = _methods(rows)
    styles = styles_of(methods)
    figure = Figure(figsize=(10.4, 5.2), layout="constrained")
    panels = (("misfit_squared", "gain_squared", "Squared error", "misfit: squared difference to the weak model", "Brier score"),
              ("misfit_kl", "gain_xent", "Cross-entropy", "misfit: KL(student || weak), nats", "cross-entropy, nats"))
    for axis, (x, y, title, xlabel, loss) in zip(figure.subplots(1, 2), panels, strict=True):
        for row in rows:
            colour, marker = styles[row["method"]]
            for ci, xs, ys in ((row[f"{x}_ci"], row[f"{x}_ci"], (row[y],) * 2), (row[f"{y}_ci"], (row[x],) * 2, row[f"{y}_ci"])):
                if ci:
                    axis.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.35, zorder=2)
            axis.plot([row[x]], [row[y]], color=colour, marker=marker, markersize=5.5, markeredgecolor="white", markeredgewidth=0.4,
                      linestyle="none", zorder=3)
        high = max(0.0, *(max(r[x], r[y]) for r in rows))
        axis.plot((0, high), (0, high), color="0.55", linestyle="--", linewidth=1.2, zorder=1)
        axis.axhline(0, color="0.55", linewidth=1.2, zorder=1)
        axis.set_xlim(left=0)
        plain_axis(axis, title, xlabel, f"gain over the weak model: {loss}")
    handles = [*(legend_line(styles[x], x, line=False) for x in methods), legend_guide("--", "gain = misfit"), legend_guide("-", "no gain")]
    return render(figure, handles)


def reliability(rows: Sequence[dict]) -> dict[str, bytes]:
    """Accuracy against confidence, a panel for the weak model, its labels, each method and the ceiling: {"png": bytes, "svg": bytes}.

    `rows`: `Comparison.reliability`. Thin lines are the tasks (bins of 10 documents or more), the thick one all their documents.
    """
    from matplotlib.figure import Figure

    names = [n for n in ("weak", "weak labels") if any(r["series"] == n for r in rows)]
    methods = [n for n in dict.fromkeys(r["series"] for r in rows) if n not in ("weak", "weak labels", "ceiling")]
    styles = {**styles_of(methods), "weak": WEAK, "weak labels": WEAK, "ceiling": CEILING}
    names += [*methods, "ceiling"]
    across = min(4, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(2.6 * across, 2.6 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    left = 0.0 if min(r["low"] for r in rows) < 0.45 else 0.45  # two classes: confidence is never below one half
    for axis, name in zip(axes, names, strict=False):
        colour, marker = styles[name]
        here = [r for r in rows if r["series"] == name]
        tasks = list(dict.fromkeys(r["task"] for r in here))
        axis.plot((left, 1), (left, 1), color="0.55", linestyle="--", linewidth=1.2, zorder=1)
        for task in tasks if len(tasks) > 1 else []:
            line = [r for r in here if r["task"] == task and r["n"] >= 10]
            axis.plot([r["confidence"] for r in line], [r["accuracy"] for r in line], color=colour, linewidth=0.7, alpha=0.45, zorder=2)
        points = []
        for low in sorted({r["low"] for r in here}):
            bins = [r for r in here if r["low"] == low]
            n = sum(r["n"] for r in bins)
            points.append([sum(r["n"] * r[k] for r in bins) / n for k in ("confidence", "accuracy")] + [n])
        axis.plot(*zip(*((x, y) for x, y, _ in points), strict=True), color=colour, linewidth=1.6, zorder=3)
        largest = max(n for *_, n in points)
        axis.scatter(*zip(*((x, y) for x, y, _ in points), strict=True), [6 + 40 * n / largest for *_, n in points], color=colour,
                     marker=marker, edgecolors="white", linewidths=0.4, zorder=4)
        axis.set_xlim(left, 1.02)
        axis.set_ylim(min(left, *(r["accuracy"] for r in rows)) - 0.02, 1.03)
        plain_axis(axis, name, "", "accuracy" if axis in axes[::across] else "")
    for axis in axes[len(names):]:
        axis.set_axis_off()
    for axis in axes[max(0, len(names) - across):len(names)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
    for axis in axes[(down - 1) * across:len(names)]:
        axis.set_xlabel("confidence", fontsize=9)
    return render(figure, [legend_guide("--", "calibrated: confidence = accuracy")])


def plain_axis(axis, title: str, xlabel: str, ylabel: str) -> None:
    """An axis of two scales: a light grid, no frame, title flush left."""
    axis.tick_params(labelsize=8.5)
    axis.grid(color="0.93", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)


def draw_pgr(axis, row: dict, line: int, style: tuple[str, str], low: float, high: float) -> None:
    """PGR of a row of `metrics.pgr` (with `method`) at height `line`, or why it has none; `low`, `high`: the axis's limits."""
    if row["pgr_ci"] is None:
        text = "undefined, no gap" if row["pgr"] is None else f"withheld, no gap in {100 * row['undefined']:.0f}%"
        axis.text(0.01, line, f"{row['method']}: {text}", color="0.25", fontsize=7, va="center", transform=axis.get_yaxis_transform(),
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, zorder=2)
        return
    inside = min(max(row["pgr"], low), high)
    draw_dot(axis, inside, row["pgr_ci"], line, style, hollow=not row["gap_clear"], centre=row["pgr"])
    if inside != row["pgr"]:
        right = inside == high
        axis.annotate(number(row["pgr"], 1), (inside, line), (-4 if right else 4, 1.5), textcoords="offset points", fontsize=7,
                      va="bottom", ha="right" if right else "left")


def draw_dot(axis, value: float, ci, line: float, style: tuple[str, str], hollow: bool = False, centre: float | None = None) -> None:
    """A value at height `line`, with its interval where it has one; `centre`: the value itself where `value` is the panel's edge."""
    colour, marker = style
    if ci:
        axis.plot(ci, (line, line), color=colour, linewidth=1.6, solid_capstyle="butt", marker="|", markersize=6, zorder=2)
    edge = centre is not None and centre != value  # at the edge of the panel: show the marker whole
    axis.plot([value], [line], color=colour, marker=marker, markersize=5.5, markerfacecolor="white" if hollow else colour,
              linestyle="none", zorder=3, clip_on=not edge)


def _blocks(rows: Sequence[dict]) -> dict[str, dict[str, dict[str, dict]]]:
    """task -> pair -> method -> row, in the order of the rows; of several metrics the first one's rows."""
    blocks: dict = {}
    for row in rows:
        blocks.setdefault(row["task"], {}).setdefault(_name(row), {}).setdefault(row["method"], row)
    return blocks


def _name(row: dict) -> str:
    name = f"{row['weak_model']} \u2192 {row['strong_model']}"
    return name if len(name) <= 32 else f"{row['weak_model']}\n\u2192 {row['strong_model']}"


def _methods(rows: Sequence[dict]) -> list[str]:
    """In the order of the rows, which is the sweep's."""
    return list(dict.fromkeys(r["method"] for r in rows))


def styles_of(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method, by its name, so that it looks the same in every report.

    Losses and the usual other methods have places of their own; others get one by a hash of their name, the next free one
    where it is taken. A random control has its method's marker in a lighter colour, an oracle's method its colour and another marker.
    """
    places: dict[str, int] = {}
    for base in sorted({_base(m) for m in methods}, key=lambda b: (b not in LOSS_ARGS, b not in USUAL, b)):
        place = list(LOSS_ARGS).index(base) if base in LOSS_ARGS else USUAL.get(base)
        if place is None:
            place = 2 * len(COLOURS) + zlib.crc32(base.encode()) % (len(COLOURS) * (len(MARKERS) - 2))
        while place in places.values():
            place += 1
        places[base] = place
    out = {}
    for method in methods:
        place = places[_base(method)]
        colour, marker = COLOURS[place % len(COLOURS)], place + place // len(COLOURS)
        out[method] = (_lighter(colour) if CONTROL in method else colour, MARKERS[(marker + 5 * method.endswith(ORACLE)) % len(MARKERS)])
    return out


def _base(method: str) -> str:
    return method.removesuffix(ORACLE).removesuffix(CONTROL)


def _lighter(colour: str) -> str:
    return "#" + "".join(f"{(int(colour[i:i + 2], 16) + 255) // 2:02X}" for i in (1, 3, 5))


def _canvas(blocks: dict, height: int, columns: int):
    """A figure, and for each task its axes (a list of `columns`); many tasks stand in several columns."""
    from matplotlib.figure import Figure

    across = 1 if len(blocks) <= 4 else 2 if len(blocks) <= 12 else 3
    down = math.ceil(len(blocks) / across)
    tallest = max(len(pairs) for pairs in blocks.values()) * height * LINE + 0.75
    wide = 7.2 if across * columns == 1 else 5.2 * across * columns
    figure = Figure(figsize=(wide, down * tallest + 0.7), layout="constrained")
    grid = figure.subplots(down, across * columns, squeeze=False)
    cells = [grid[i // across][(i % across) * columns:(i % across + 1) * columns] for i in range(down * across)]
    for unused in cells[len(blocks):]:
        for axis in unused:
            axis.set_axis_off()
    return figure, cells[:len(blocks)]


def _finish(axis, title: str, labels: list[str], height: int, xlabel: str) -> None:
    """Titles, one tick a block, the first block on top, light lines between blocks."""
    centres = [index * height + (height - 2) / 2 for index in range(len(labels))]
    axis.set_yticks(centres, labels, fontsize=8.5)
    axis.set_ylim(height * len(labels) - 1, -1)
    for index in range(1, len(labels)):
        axis.axhline(index * height - 1, color="0.9", linewidth=0.8, zorder=0)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8.5)
    axis.grid(axis="x", color="0.93", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel(xlabel, fontsize=9)


def pgr_range(rows: Sequence[dict]) -> tuple[float, float]:
    """Limits of a PGR axis: 0, 1 and every interval, as far as EDGES go."""
    values = [x for r in rows if r["pgr_ci"] for x in (r["pgr"], *r["pgr_ci"])]
    return max(EDGES[0], min([0.0, *values]) - 0.1), min(EDGES[1], max([1.0, *values]) + 0.1)


def legend_line(style: tuple[str, str], label: str, hollow: bool = False, line: bool = True):
    """A legend's entry for a style of `styles_of`, with or without its line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=style[0], marker=style[1], markersize=5.5, linewidth=0 if hollow or not line else 1.6, label=label,
                  markerfacecolor="white" if hollow else style[0])


def legend_guide(line: str, label: str):
    """A legend's entry for a grey line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color="0.55", linestyle=line, linewidth=1.2, label=label)


def render(figure, handles: list) -> dict[str, bytes]:
    """{"png": bytes, "svg": bytes} of a figure with its legend below: the same bytes every time."""
    import matplotlib

    per_row = max(2, int(figure.get_figwidth() / (0.45 + 0.06 * max(len(h.get_label()) for h in handles))))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(per_row, len(handles)), fontsize=8.5, frameon=False)
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # laid out once, not once a format
    out = {}
    with matplotlib.rc_context({"svg.hashsalt": "w2s", "svg.fonttype": "path"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, dpi=150, metadata=metadata)
            out[kind] = stream.getvalue()
    return out

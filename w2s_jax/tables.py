"""A comparison's numbers as a DataFrame, as markdown tables, and as the text of report.md."""

from __future__ import annotations

from collections.abc import Sequence

from w2s_jax.comparison import Comparison

TITLES = {"accuracy": "Accuracy", "auroc": "AUROC"}
INTERVALS = ("weak", "student", "ceiling", "gap", "gain", "pgr")
COLUMNS = ("task", "weak_model", "strong_model", "loss", "metric", "seeds", "n_test", "n_groups", "majority_baseline", *INTERVALS,
           "undefined", "gap_clear")

# The words of the report.
ROLES = """Weak: the small model, trained on ground truth. Ceiling: the large model, trained on ground truth. Student: the large
model, trained on the weak model's labels. PGR = (student - weak) / (ceiling - weak)."""
INTERVALS_NOTE = """Brackets are 95% percentile intervals of {replicates} bootstrap draws of {seeds}.
Weak, student and ceiling share the draws. "gap <= 0" is the share of draws in which PGR is undefined; above 5% PGR is withheld,
since it has no interval."""
ONE_SEED = "test documents by group (one seed: its luck is not in the intervals)"
MANY_SEEDS = "test documents by group, then seeds"
FEW_SEEDS = MANY_SEEDS + " (so few seeds understate the spread between them)"
MEDIAN_NOTE = """Over the pairs whose gap is clear (its interval lies above 0); the others are left out, those without any gap (PGR
undefined) among them."""
AGREEMENT_NOTE = """On the test set, all documents and split by the weak model being right. Near-equal columns mean imitation, errors
included; the ceiling, which never saw the weak labels, shows how often the models coincide anyway. "labels right" is the accuracy
of the labels that the student was trained on."""


def frame(comparison: Comparison, by_seed: bool = False):
    """The rows (or the rows by seed) as a pandas DataFrame: `<name>_ci` becomes `<name>_lo`, `<name>_hi`; seeds are "0 1 2"."""
    import pandas

    flat = []
    for row in comparison.by_seed if by_seed else comparison.rows:
        record = {}
        for name in COLUMNS:
            record[name] = " ".join(map(str, row[name])) if name == "seeds" else row[name]
            if name in INTERVALS:
                record[f"{name}_lo"], record[f"{name}_hi"] = row[f"{name}_ci"] or (None, None)
        flat.append(record)
    table = pandas.DataFrame(flat)
    numbers = [c for c in table.columns if c.removesuffix("_lo").removesuffix("_hi") in INTERVALS]
    return table.astype(dict.fromkeys(numbers, "float64"))  # a column that is None throughout is still a column of numbers


def agreement_frame(comparison: Comparison):
    """The agreement rows as a pandas DataFrame, columns as in `frame`."""
    import pandas

    flat = []
    for row in comparison.agreement:
        record = {}
        for name, value in row.items():
            if name.endswith("_ci"):
                record[f"{name[:-3]}_lo"], record[f"{name[:-3]}_hi"] = value or (None, None)
            else:
                record[name] = " ".join(map(str, value)) if name == "seeds" else value
        flat.append(record)
    return pandas.DataFrame(flat)


def number(value: float | None, digits: int = 3) -> str:
    """`.769`, `-.090`, `1.000`; a dash for None."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def with_interval(value: float | None, ci: Sequence[float] | None, digits: int = 3) -> str:
    """`.769 [.745, .792]`; says so where there is no value or no interval."""
    if value is None:
        return "undefined"
    return f"{number(value, digits)} [{number(ci[0], digits)}, {number(ci[1], digits)}]" if ci else f"{number(value, digits)} (no interval)"


def pgr(row: dict) -> str:
    """PGR with its interval; never without: a ratio whose denominator may be 0 is no number to quote."""
    if row["pgr"] is not None and row["pgr_ci"] is None:
        return "withheld"
    return with_interval(row["pgr"], row["pgr_ci"], 2)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A markdown table whose columns also line up as plain text; the first `left` columns are flush left, the others right."""
    cells = [[str(c).replace("|", "\\|") for c in row] for row in (header, *rows)]
    width = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    align = [str.ljust if i < left else str.rjust for i in range(len(header))]

    def line(row):
        return "| " + " | ".join(align[i](c, width[i]) for i, c in enumerate(row)) + " |"

    rule = "| " + " | ".join("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(width)) + " |"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def quality(rows: Sequence[dict]) -> str:
    """Weak, student and ceiling beside each other, each with its interval; accuracy with the majority baseline."""
    baseline = rows[0]["metric"] == "accuracy"  # AUROC's is .5 whatever the classes
    names = ("task", "weak -> strong", "loss", "documents", *(["majority"] if baseline else []), "weak", "student", "ceiling")
    body = [[r["task"], pair(r), r["loss"], r["n_test"], *([number(r["majority_baseline"])] if baseline else []),
             *(with_interval(r[k], r[f"{k}_ci"]) for k in ("weak", "student", "ceiling"))] for r in rows]
    return markdown(names, body, left=3)


def recovered(rows: Sequence[dict]) -> str:
    """The gap, the student's gain and PGR, with intervals and the share of replicates in which PGR is undefined."""
    names = ("task", "weak -> strong", "loss", "seeds", "gap", "student - weak", "PGR", "gap <= 0")
    body = [[r["task"], pair(r), r["loss"], " ".join(map(str, r["seeds"])), *(with_interval(r[k], r[f"{k}_ci"]) for k in ("gap", "gain")),
             pgr(r), percent(r["undefined"])] for r in rows]
    return markdown(names, body, left=3)


def agreement(rows: Sequence[dict]) -> str:
    """Agreement with the supervisor on the test set, split by the supervisor being right."""
    names = ("task", "weak -> strong", "loss", "labels right", "student, all", "weak right", "weak wrong", "ceiling, weak right",
             "weak wrong")
    keys = ("label_accuracy", "student_all", "student_right", "student_wrong", "ceiling_right", "ceiling_wrong")
    body = [[r["task"], pair(r), r["loss"], *("-" if r[k] is None else with_interval(r[k], r[f"{k}_ci"]) for k in keys)] for r in rows]
    return markdown(names, body, left=3)


def medians(rows: Sequence[dict]) -> str:
    """Median PGR by metric and loss, over how many pairs, and how many were left out."""
    names = ("PGR by", "loss", "median PGR", "pairs", "left out", "of these undefined")
    body = [[TITLES[r["metric"]], r["loss"], "-" if r["pgr"] is None else pgr(r), r["n_pairs"], r["left_out"], r["n_undefined"]]
            for r in rows]
    return markdown(names, body, left=2)


def pair(row: dict) -> str:
    return f"{row['weak_model']} -> {row['strong_model']}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def report(comparison: Comparison, title: str, images: dict[str, str], replicates: int) -> str:
    """The text of report.md.

    Args:
      comparison: what to show.
      title: of the page.
      images: name of a plot (accuracy | auroc | pgr) -> its file; absent ones are not linked.
      replicates: of the bootstrap, for the note on intervals.
    """
    c = comparison
    seeds = max(len(r["seeds"]) for r in c.rows)
    metrics = [m for m in TITLES if any(r["metric"] == m for r in c.rows)]

    def image(name: str) -> list[str]:
        return [f"![{name}]({images[name]})"] if name in images else []

    drawn = ONE_SEED if seeds == 1 else FEW_SEEDS if seeds < 5 else MANY_SEEDS
    parts = [f"# {title}", ROLES, INTERVALS_NOTE.format(replicates=replicates, seeds=drawn)]
    if c.missing:
        parts += [f"**Incomplete: {len(c.missing)} runs are not done** (listed at the end); what follows is what is done."]
    if c.warnings:
        parts += ["## Read with care", "\n".join(f"- {line}" for line in c.warnings)]
    parts += ["## Median over pairs", MEDIAN_NOTE, medians(c.medians), *image("pgr")]
    for metric in metrics:
        rows = [r for r in c.rows if r["metric"] == metric]
        parts += [f"## {TITLES[metric]}", quality(rows), *image(metric), recovered(rows)]
    parts += ["## Agreement with the supervisor", AGREEMENT_NOTE, agreement(c.agreement)]
    if seeds > 1:
        parts += ["## By seed", "One seed a row; its intervals come from the test documents alone."]
        for metric in metrics:
            rows = [r for r in c.by_seed if r["metric"] == metric]
            parts += [f"### {TITLES[metric]}", by_seed(rows)]
    if c.missing:
        body = [[r["task"], r["role"], r["run"], r["state"], r["blocks"]] for r in c.missing]
        parts += ["## Runs that are not done", markdown(("task", "role", "run", "state", "students it blocks"), body, left=4)]
    if c.notes:
        parts += ["## Notes", "\n".join(f"- {line}" for line in c.notes)]
    return "\n\n".join(parts) + "\n"


def excerpt(comparison: Comparison) -> str:
    """The accuracy tables alone, over seeds and by seed: what a README shows."""
    rows = [r for r in comparison.rows if r["metric"] == "accuracy"]
    parts = [quality(rows), recovered(rows)]
    if max(len(r["seeds"]) for r in rows) > 1:
        parts += ["By seed:", by_seed([r for r in comparison.by_seed if r["metric"] == "accuracy"])]
    return "\n\n".join(parts)


def by_seed(rows: Sequence[dict]) -> str:
    """One seed a row: the three values, the gap and PGR with their intervals."""
    names = ("task", "weak -> strong", "loss", "seed", "weak", "student", "ceiling", "gap", "PGR", "gap <= 0")
    body = [[r["task"], pair(r), r["loss"], r["seeds"][0], *(number(r[k]) for k in ("weak", "student", "ceiling")),
             with_interval(r["gap"], r["gap_ci"]), pgr(r), percent(r["undefined"])] for r in rows]
    return markdown(names, body, left=3)

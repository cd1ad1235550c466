"""A comparison's numbers as a DataFrame, as markdown tables, and as the text of report.md."""

from __future__ import annotations

from collections.abc import Sequence

from w2s_jax.comparison import Comparison
from w2s_jax.significance import FEWEST

TITLES = {"accuracy": "Accuracy", "auroc": "AUROC"}
INTERVALS = ("weak", "student", "ceiling", "gap", "gain", "pgr")
COLUMNS = ("task", "weak_model", "strong_model", "method", "metric", "seeds", "n_test", "n_groups", "majority_baseline", *INTERVALS,
           "undefined", "gap_clear")

FRAMES = ("table", "by_seed", "agreement", "misfit", "calibration", "reliability", "tests")  # each is also a csv file

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
TESTS_NOTE = """Each method against its baseline, each filter against its random control of the same size. One observation is a task
and a pair of models, by its mean over the seeds that both students have; pairs of one task share documents and models, and weigh
less than their number says. PGR counts where the gap is clear; "left out" are the others. Wins: how often the method is ahead.
p-values are two-sided and not corrected for the number of rows. Where it says "n < 6", Wilcoxon's test cannot reach 5%: with n
differences that are not 0 its smallest p-value is 2 / 2^n."""
AGREEMENT_NOTE = """On the test set, all documents and split by the weak model being right. Near-equal columns mean imitation, errors
included; the ceiling, which never saw the weak labels, shows how often the models coincide anyway. "labels right" is the accuracy
of the labels that the student was trained on."""
ERRORS_NOTE = """"Inherited": the share of the weak model's test errors that the student repeats, less the share that the ceiling makes
too (a model of that size errs there anyway). Then, of the student's own errors and of the ceiling's, the share that are also the
weak model's."""
MISFIT_NOTE = """Misfit: how far the student's probabilities lie from the weak model's on the test set, in squared error and as
KL(student || weak). Gain: the weak model's loss against ground truth less the student's, in the same loss (Brier score;
cross-entropy in nats). Where the student is the closest that its class of models comes to the weak model, and the class is convex
and holds the truth, the gain is at least the misfit (arXiv 2405.15116, 2501.19105), which predicts it without any ground truth.
"xent to weak" is the cross-entropy to the weak model's probabilities, which training brings down."""
CALIBRATION_NOTE = """ECE: expected calibration error in 15 bins of the confidence, on the test set; of the weak labels, on their own
documents where the truth is known. Overconfidence: mean confidence less accuracy. ECE has no interval, since resampling only adds
to it."""


def frame(comparison: Comparison, name: str = "table"):
    """One of the report's tables as a pandas DataFrame: `<name>_ci` becomes `<name>_lo`, `<name>_hi`; seeds are "0 1 2".

    `name`: table (the rows over seeds), or a field of Comparison that is in FRAMES.
    """
    import pandas

    flat = []
    for row in comparison.rows if name == "table" else getattr(comparison, name):
        record = {}
        for key in COLUMNS if name in ("table", "by_seed") else [k for k in row if not k.endswith("_ci")]:
            record[key] = " ".join(map(str, row[key])) if key == "seeds" else row[key]
            if f"{key}_ci" in row:
                record[f"{key}_lo"], record[f"{key}_hi"] = row[f"{key}_ci"] or (None, None)
        flat.append(record)
    table = pandas.DataFrame(flat)
    # A column of numbers that is None throughout is still a column of numbers.
    texts = {key for record in flat for key, value in record.items() if isinstance(value, str | bool)}
    return table.astype({c: "float64" for c in table.columns if table[c].dtype == object and c not in texts})


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
    names = ("task", "weak -> strong", "method", "documents", *(["majority"] if baseline else []), "weak", "student", "ceiling")
    body = [[r["task"], pair(r), r["method"], r["n_test"], *([number(r["majority_baseline"])] if baseline else []),
             *(with_interval(r[k], r[f"{k}_ci"]) for k in ("weak", "student", "ceiling"))] for r in rows]
    return markdown(names, body, left=3)


def recovered(rows: Sequence[dict]) -> str:
    """The gap, the student's gain and PGR, with intervals and the share of replicates in which PGR is undefined."""
    names = ("task", "weak -> strong", "method", "seeds", "gap", "student - weak", "PGR", "gap <= 0")
    body = [[r["task"], pair(r), r["method"], " ".join(map(str, r["seeds"])), *(with_interval(r[k], r[f"{k}_ci"]) for k in ("gap", "gain")),
             pgr(r), percent(r["undefined"])] for r in rows]
    return markdown(names, body, left=3)


def agreement(rows: Sequence[dict]) -> str:
    """Agreement with the supervisor on the test set, split by the supervisor being right."""
    names = ("task", "weak -> strong", "method", "labels right", "student, all", "weak right", "weak wrong", "ceiling, weak right",
             "weak wrong")
    keys = ("label_accuracy", "student_all", "student_right", "student_wrong", "ceiling_right", "ceiling_wrong")
    body = [[r["task"], pair(r), r["method"], *(_defined(r, k) for k in keys)] for r in rows]
    return markdown(names, body, left=3)


def errors(rows: Sequence[dict]) -> str:
    """Inherited errors: what the student repeats beyond the ceiling, and whose errors are whose."""
    names = ("task", "weak -> strong", "method", "inherited", "student's errors, weak's too", "ceiling's errors, weak's too")
    keys = ("inherited", "student_shared", "ceiling_shared")
    body = [[r["task"], pair(r), r["method"], *(_defined(r, k) for k in keys)] for r in rows]
    return markdown(names, body, left=3)


def misfit(rows: Sequence[dict]) -> str:
    """The misfit between student and supervisor, which predicts the gain, beside the gain."""
    names = ("task", "weak -> strong", "method", "misfit, squared", "gain, squared", "misfit, KL", "gain, xent", "xent to weak")
    keys = ("misfit_squared", "gain_squared", "misfit_kl", "gain_xent")
    body = [[r["task"], pair(r), r["method"], *(_defined(r, k) for k in keys), number(r["misfit_xent"])] for r in rows]
    return markdown(names, body, left=3)


def calibration(rows: Sequence[dict]) -> str:
    """ECE of every role, and how far weak model and student claim more than they know."""
    names = ("task", "weak -> strong", "method", "ECE, weak", "labels", "student", "ceiling", "overconfidence, weak", "student", "ceiling")
    body = [[r["task"], pair(r), r["method"], *(number(r.get(f"{role}_ece")) for role in ("weak", "label", "student", "ceiling")),
             *(_defined(r, f"{role}_overconfidence") for role in ("weak", "student", "ceiling"))] for r in rows]
    return markdown(names, body, left=3)


def tests(rows: Sequence[dict]) -> str:
    """The paired tests between methods."""
    names = ("method", "against", "on", "pairs", "tasks", "left out", "mean difference", "wins", "t-test p", "Wilcoxon p")
    on = {"accuracy": "accuracy", "auroc": "AUROC", "pgr_accuracy": "PGR (accuracy)", "pgr_auroc": "PGR (AUROC)"}
    body = []
    for r in rows:
        wins = f"{r['wins']} of {r['n']}" + (f", {r['ties']} equal" if r["ties"] else "")
        few = " (n < 6)" if 0 < r["wilcoxon_n"] < FEWEST else ""
        against = r["against"] + (" (control)" if r["kind"] == "control" else "")
        body.append([r["method"], against, on[r["measure"]], r["n"], r["n_tasks"], r["left_out"], number(r["mean_difference"]), wins,
                     p_value(r["t_p"]), p_value(r["wilcoxon_p"]) + few])
    return markdown(names, body, left=3)


def p_value(p: float | None) -> str:
    """`.135`, `<.001`; a dash for None."""
    return "<.001" if p is not None and p < 0.0005 else number(p)


def _defined(row: dict, key: str) -> str:
    return "-" if row.get(key) is None else with_interval(row[key], row[f"{key}_ci"])


def medians(rows: Sequence[dict]) -> str:
    """Median PGR by metric and method, over how many pairs, and how many were left out."""
    names = ("PGR by", "method", "median PGR", "pairs", "left out", "of these undefined")
    body = [[TITLES[r["metric"]], r["method"], "-" if r["pgr"] is None else pgr(r), r["n_pairs"], r["left_out"], r["n_undefined"]]
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
      images: name of a plot (accuracy | auroc | pgr | misfit | reliability) -> its file; absent ones are not linked.
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
    if c.tests:
        parts += ["## Methods compared", TESTS_NOTE, tests(c.tests)]
    for metric in metrics:
        rows = [r for r in c.rows if r["metric"] == metric]
        parts += [f"## {TITLES[metric]}", quality(rows), *image(metric), recovered(rows)]
    parts += ["## Agreement with the supervisor", AGREEMENT_NOTE, agreement(c.agreement)]
    parts += ["## Inherited errors", ERRORS_NOTE, errors(c.agreement)]
    parts += ["## Misfit and gain", MISFIT_NOTE, misfit(c.misfit), *image("misfit")]
    parts += ["## Calibration", CALIBRATION_NOTE, calibration(c.calibration), *image("reliability")]
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
    names = ("task", "weak -> strong", "method", "seed", "weak", "student", "ceiling", "gap", "PGR", "gap <= 0")
    body = [[r["task"], pair(r), r["method"], r["seeds"][0], *(number(r[k]) for k in ("weak", "student", "ceiling")),
             with_interval(r["gap"], r["gap_ci"]), pgr(r), percent(r["undefined"])] for r in rows]
    return markdown(names, body, left=3)

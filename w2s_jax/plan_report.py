"""A plan as markdown: one page for one point, a table for several. Pure functions of results.json's points."""

from __future__ import annotations

from w2s_jax import costs

GIB, GB = 2**30, 1e9


def text(points: list[dict], config) -> str:
    """plan.md."""
    if len(points) == 1:
        return page(points[0], config) + "\n" + _assumptions(points, config)
    return table(points, config) + "\n" + _assumptions(points, config)


def _what(point: dict, config) -> str:
    lengths = "SciQ's lengths" if config.lengths == "sciq" else f"{config.lengths} tokens each"
    if point["what"] == "label":
        return f"labelling {config.n_train} documents, {lengths}"
    return f"a step of {config.batch_size} documents, {lengths}, train={point['train']}, {config.optimizer}"


def _settings(s: dict) -> list[str]:
    """Mesh, policy and microbatch."""
    return [f"{s['data']}x{s['fsdp']}x{s['model']}", s["remat"], str(s["microbatch_size"] or "whole")]


def table(points: list[dict], config) -> str:
    """One row a point."""
    head = ["model", "slice", "mesh", "remat", "micro-batch", "GiB a chip", "of", "GB sent", "s a step", "bound by", "tokens/s"]
    lines = [f"{_what(points[0], config)[0].upper()}{_what(points[0], config)[1:]}, {config.dtype}, parameters {config.param_dtype}; "
             f"matrix products at {config.utilisation:.0%} of the peak", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for p in points:
        s, has = p["settings"], f"{p['memory_of_chip'] / GIB:.1f}"
        cells = [p["model"].split("/")[-1], p["topology"]]
        if p["fits"]:
            c = p["compiled"]
            sent = sum(x["bytes"] for x in c["cost"]["collectives"])
            cells += [*_settings(s), f"{c['needed'] / GIB:.1f}", has, f"{sent / GB:.2f}", f"{p['step_seconds']:.3g}", p["times"]["bound"],
                      f"{p['tokens_per_second']:,.0f}"]
        else:
            needs = f"{p['needed'] / GIB:.1f}" if p["needed"] else "more"
            cells += [*_settings(s), needs, has, "", "", "does not fit" + (f"; take {p['larger']}" if p["larger"] else ""), ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(p: dict, config) -> str:
    """One point."""
    kind = "compiled by the TPU's compiler" if p["compiler"] == "TPU" else "an ESTIMATE: partitioned by XLA on a CPU, memory by arithmetic"
    lines = [f"# {p['model']} on {p['topology']}", "",
             f"{p['parameters'] / 1e9:.3g}B parameters, {p['chips']} chips, {_what(p, config)}; {kind}", ""]
    s = p["settings"]
    flags = " ".join(f"--config.mesh.{axis}={s[axis]}" for axis in ("data", "fsdp", "model"))
    if p["what"] == "train":  # labelling takes the rest from the run
        flags += f" --config.remat={s['remat']}"
        flags += f" --config.microbatch_size={s['microbatch_size']}" if s["microbatch_size"] else ""
        flags += f" --config.offload={config.offload}" if config.offload != "none" else ""
    if not p["fits"]:
        needs = f"{p['needed'] / GIB:.1f} GiB" if p["needed"] else "more than that"
        mesh, remat, size = _settings(s)
        lines += [f"**Does not fit**: the smallest setting that was compiled (mesh {mesh}, remat {remat}, microbatch {size}) needs {needs} "
                  f"a chip of {p['memory_of_chip'] / GIB:.1f}.",
                  f"By arithmetic it fits {p['larger']}." if p["larger"] else "No slice of these chips was found that it fits."]
        lines += ["", *_tried(p)]
        return "\n".join(lines) + "\n"
    c = p["compiled"]
    cost, m, times = c["cost"], c["memory"], p["times"]
    if p["changed"]:
        lines += [f"**What was asked for does not fit**; the nearest that does changes {', '.join(p['changed'])}.", ""]
    peak = c["needed"] / GIB
    rows = [("parameters", c["parts"]["parameters"] / GIB, "GiB"), ("optimizer state", c["parts"]["optimizer_state"] / GIB, "GiB"),
            ("temporaries (gradients, activations)", m["temporaries"] / GIB, "GiB"),
            ("memory used", peak, f"GiB of {p['memory_of_chip'] / GIB:.1f} ({peak * GIB / p['memory_of_chip']:.0%})"),
            ("FLOPs a step", (cost["flops"] + cost["attention_flops"]) / 1e12, "T"), ("memory traffic a step", cost["bytes"] / GB, "GB"),
            ("sent to other chips a step", sum(x["bytes"] for x in cost["collectives"]) / GB, "GB")]
    if p["host_traffic"]:
        rows += [("in the host's memory", sum(c["host"].values()) / GIB, "GiB"),
                 ("from and to the host a step", p["host_traffic"] / GB, "GB, over a link whose time is not in what follows")]
    lines += [f"Settings: `{flags}`", "", "| a chip | | |", "|---|---:|---|", *(f"| {a} | {b:.3g} | {unit} |" for a, b, unit in rows), ""]
    if cost["collectives"]:
        lines += ["| collectives a step | chips | times | GB sent |", "|---|---:|---:|---:|"]
        lines += [f"| {x['kind']} | {x['group']} | {x['count']} | {x['bytes'] / GB:.3g} |" for x in cost["collectives"]] + [""]
    shapes = ", ".join(f"{r}x{t}" for r, t in c["shapes"])
    lines += ["| predicted | |", "|---|---|",
              f"| compute, memory, links | {times['compute']:.3g}, {times['memory']:.3g}, {times['interconnect']:.3g} s |",
              f"| a {'step' if p['what'] == 'train' else 'pass'} | {p['step_seconds']:.3g} s, bound by {times['bound']} "
              f"({p['step_seconds_serial']:.3g} s if links and the rest did not overlap) |",
              f"| useful tokens | {p['tokens_per_second']:,.0f} a second |",
              f"| an epoch, the whole run | {_time(p['epoch_seconds'])}, {_time(p['run_seconds'])} ({c['steps']} steps) |", "",
              f"Cells of {shapes} tokens on {c['cells']} places, {c['microbatches']} microbatches, padding "
              f"{1 - c['useful'] / c['computed']:.0%}, attention {c['attention']}, {c['group']} steps in one call; compiled in "
              f"{c['seconds']['compile']:.0f} s."]
    if c["lesser_sharding"]:
        lines += ["", f"What does not divide over this mesh, and lies there in a lesser way: {', '.join(c['lesser_sharding'])}."]
    return "\n".join([*lines, "", *_tried(p)]) + "\n"


def _tried(p: dict) -> list[str]:
    rows = [(*_settings(t["settings"]), f"{t['estimate'] / GIB:.1f}", f"{t['needed'] / GIB:.1f}" if t["needed"] else "more",
             "yes" if t["fits"] else "no") for t in p["tried"]]
    return ["| compiled: mesh | remat | microbatch | GiB by arithmetic | GiB by the compiler | fits |", "|---|---|---|---:|---:|---|",
            *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _assumptions(points: list[dict], config) -> str:
    gpu = any(p["compiler"] != "TPU" for p in points)
    lines = [
        f"- matrix products reach {config.utilisation:.0%} of the chip's peak; memory and links {costs.BANDWIDTH:.0%} of what is published "
        "(w2s_jax/chips.py); a step takes as long as the longest of the three",
        "- FLOPs are those of matrix products, traffic and collectives are read from the compiled program, the bodies of loops counted as "
        "often as they run; attention kernels count whole squares",
        "- a collective rides one axis of the torus in both directions (two links); bytes sent are those of rings",
    ]  # fmt: skip
    if gpu:
        lines.append("- GPUs: the program is partitioned by XLA's CPU compiler, whose fusions differ; memory is arithmetic: an estimate")
    return "\n".join(lines) + "\n"

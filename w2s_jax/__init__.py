"""Weak-to-strong generalization in JAX: fine-tune, label, transfer, report.

    import w2s_jax
    run = w2s_jax.load("runs/gpt2")
    run.config, run.results, run.metrics, run.predictions("test")
"""

__version__ = "0.1.0"


def load(run_dir):
    """Opens a run directory for reading: `.config`, `.results`, `.metrics`, `.predictions(split)` and, on demand, `.model()`."""
    from w2s_jax.runlog import LoadedRun

    def open_model(run):
        from w2s_jax import vision, workload  # import jax: only who asks for the model waits for it

        return (vision if run.config.get("stage") in ("vision", "vision_train") else workload).restore(run)

    return LoadedRun(run_dir, open_model)

"""Lengths of documents where there are no documents: what benchmarks and plans are made with."""

from __future__ import annotations

import numpy as np

# Lengths of SciQ's training questions in GPT-2's tokens (mean 21.7), as quantiles.
SCIQ = {0: 10, 0.01: 12, 0.05: 14, 0.1: 15, 0.2: 17, 0.3: 18, 0.4: 19, 0.5: 21, 0.6: 22, 0.7: 24, 0.8: 26, 0.9: 29, 0.95: 33,
        0.975: 37, 0.99: 43, 0.995: 49, 0.999: 63, 1: 90}


def sciq_lengths(documents: int, seed: int) -> np.ndarray:
    """Lengths in tokens, int `[documents]`, drawn from SciQ's distribution."""
    u = np.random.default_rng(np.random.SeedSequence([seed, 0x5C19])).random(documents)
    return np.interp(u, list(SCIQ), list(SCIQ.values())).round().astype(int)

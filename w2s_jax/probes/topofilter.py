"""TopoFilter: which points hang together with others of their label.

Wu et al. 2020 (arXiv 2012.04835) in the form of EleutherAI/w2s, `topo.py`.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components


def components(neighbours: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Members of the largest strongly connected component of each class, bool `[n]`.

    Args:
        neighbours: int `[n, k]`, the nearest neighbours of each point among ALL points, itself excluded.
        positive: bool `[n]`, the points of class 1.

    The graph of a class has the edges point -> neighbour of that class's points. Of several components of the largest size the
    first in scipy's numbering is taken, as in the reference. A class without points keeps none.
    """
    n, k = neighbours.shape
    kept = np.zeros(n, bool)
    for members in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        if not len(members):
            continue
        edges = np.ones(len(members) * k, np.int8), (np.repeat(members, k), neighbours[members].ravel())
        graph = csr_matrix(edges, shape=(n, n))
        graph.sort_indices()
        _, labels = connected_components(graph, directed=True, connection="strong")
        # Other points are components of their own here, without an edge that leaves them: not to be counted.
        kept |= labels == np.bincount(labels[members]).argmax()
    return kept

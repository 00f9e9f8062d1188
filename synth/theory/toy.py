"""The toy model of EntiGraph's gain (arXiv 2409.07431, section 6): a relation graph learned by deduction.

Reading of the paper from its published formula (the wording of the update is unverified): every step searches
the *source* graph M_0, never what was learned since, and learns the pairs (x, z) for all z on the path.
"""

import random
from collections import deque
from collections.abc import Sequence

import numpy as np

Tree = list[
    int
]  # parent of each entity in a breadth-first tree, -1 for the root and for what it does not reach


def random_graph(num_entities: int, p: float, seed: int) -> np.ndarray:
    """M_0 as bool [V, V]: each ordered pair of different entities with probability p, drawn row by row."""
    chance = random.Random(seed)
    graph = np.zeros((num_entities, num_entities), dtype=bool)
    for i in range(num_entities):
        for j in range(num_entities):
            if i != j:
                graph[i, j] = chance.random() < p
    return graph


def breadth_first_trees(graph: np.ndarray) -> list[Tree]:
    """One tree for each entity; of several parents the one found first in index order is kept."""
    successors = [np.flatnonzero(row).tolist() for row in graph]
    return [_tree(successors, root) for root in range(len(successors))]


def _tree(successors: Sequence[Sequence[int]], root: int) -> Tree:
    parents = [-1] * len(successors)
    seen = {root}
    queue = deque([root])
    while queue:
        here = queue.popleft()
        for there in successors[here]:
            if there not in seen:
                seen.add(there)
                parents[there] = here
                queue.append(there)
    return parents


def learn(known: np.ndarray, trees: list[Tree], x: int, y: int) -> None:
    """One step in place: if y is reachable from x in the source, learn (x, z) for every z on the path, y included."""
    parents = trees[x]
    here = y
    while parents[here] >= 0:
        known[x, here] = True
        here = parents[here]


def simulate(graph: np.ndarray, times: Sequence[int], seed: int) -> list[float]:
    """Acc(M_t) at each of the ascending `times`, for one sequence of uniform ordered pairs."""
    chance = random.Random(seed)
    trees = breadth_first_trees(graph)
    known = graph.copy()
    num = len(graph)
    accuracies = []
    step = 0
    for time in times:
        while step < time:
            x = chance.randrange(num)
            y = chance.randrange(num - 1)
            learn(known, trees, x, y + (y >= x))
            step += 1
        accuracies.append(float(known.sum()) / (num * (num - 1)))
    return accuracies

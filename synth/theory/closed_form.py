"""The toy model's expected accuracy in closed form, its published bounds, and its limit for large random graphs."""

import math

import numpy as np

from synth.theory.toy import Tree, breadth_first_trees


def subtree_sizes(parents: Tree, root: int) -> np.ndarray:
    """For each entity the number of entities in its subtree, itself included; 0 where the root does not reach."""
    num = len(parents)
    sizes = np.zeros(num, dtype=np.int64)
    for node in range(num):
        if node != root and parents[node] < 0:
            continue
        here = node
        while here >= 0:
            sizes[here] += 1
            here = parents[here]
    return sizes


def expected_accuracy(graph: np.ndarray, times: np.ndarray) -> np.ndarray:
    """E[Acc(M_t)] for each t, exactly: (i, j) is learned when a y below j in the tree of i is drawn with x = i."""
    num = len(graph)
    pairs = num * (num - 1)
    sizes = []
    for root, parents in enumerate(breadth_first_trees(graph)):
        own = subtree_sizes(parents, root)
        new = (own > 0) & ~graph[root]
        new[root] = False
        sizes.append(own[new])
    counts = np.bincount(np.concatenate(sizes)) if sizes else np.zeros(1)
    s = np.flatnonzero(counts)
    gain = counts[s] * -np.expm1(np.outer(np.asarray(times, dtype=float), np.log1p(-s / pairs)))
    return graph.sum() / pairs + gain.sum(axis=1) / pairs


def extinction(mean: float) -> float:
    """The smallest root of rho = exp(mean (rho - 1)) for mean > 1, by Newton's method from 0."""
    if mean <= 1:
        raise ValueError(f"mean must be above 1, got {mean}; at or below it the root is 1")
    rho = 0.0
    for _ in range(100):
        value = math.exp(mean * (rho - 1))
        step = (value - rho) / (1 - mean * value)
        rho += step
        if abs(step) < 1e-16:
            break
    return rho


def reachable_limit(mean: float) -> float:
    """C = (1 - rho)^2: the share of pairs that become known, for V to infinity."""
    return (1 - extinction(mean)) ** 2


def bounds(
    num_entities: int, mean: float, times: np.ndarray, epsilon: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The published lower and upper bound. They hold only for V to infinity: draw them, do not assert them."""
    times = np.asarray(times, dtype=float)
    pairs = num_entities * (num_entities - 1)
    p, limit = mean / num_entities, reachable_limit(mean)
    low = 1 - 1 / pairs
    high = 1 - (1 + epsilon) * math.log(num_entities) / (pairs * math.log(mean))
    lower = (p + limit * (1 - low**times)) * (1 - epsilon)
    return lower, (p + limit * (1 - high**times)) * (1 + epsilon)


def mixture(
    num_entities: int, mean: float, times: np.ndarray, *, max_depth: int = 60, max_size: int = 4000
) -> np.ndarray:
    """The mixture of exponentials for a random graph: subtree sizes as cut Poisson branching processes.

    p_l(k), the probability that a process cut at l generations has k members, is built by
    G_l(z) = z exp(mean (G_{l-1}(z) - 1)) on the unit circle; sizes of `max_size` and more are one term.
    """
    times = np.asarray(times, dtype=float)
    pairs = num_entities * (num_entities - 1)
    circle = np.exp(2j * np.pi * np.arange(max_size) / max_size)
    generating = circle.copy()
    sizes = np.arange(max_size)
    left = np.zeros(len(times))
    weight_left = 1.0
    keep = np.exp(np.outer(times, np.log1p(-np.minimum(sizes, pairs - 1) / pairs)))
    for depth in range(max_depth):
        weight = (mean - 1) / mean ** (depth + 1)
        weight_left -= weight
        probability = np.clip(np.real(np.fft.fft(generating)) / max_size, 0, None)
        left += weight * keep @ probability
        generating = circle * np.exp(mean * (generating - 1))
        if weight_left * mean ** (depth + 1) < 1e-9 or weight < 1e-9 or mean ** (depth + 1) > max_size / 8:
            break
    return mean / num_entities + reachable_limit(mean) * (1 - left - weight_left * keep[:, -1])

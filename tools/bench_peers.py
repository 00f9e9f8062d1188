"""Search for pairs and the sandbox beside what else does their work, on this machine: turns, medians and ranges.

    python -m tools.bench_peers what=pairing pairs=5 vectors.num_vectors=100000 out=pairing.json
    python -m tools.bench_peers what=sandbox pairs=30 out=sandbox.json

Pairing: the nearest neighbors of `num_queries` documents among all, on the same unit vectors, by our inverted lists
and our exact search, by FAISS' flat index and by scikit-learn's brute force. Sandbox: an empty job in each level that
this host holds, from nothing to nothing, beside a plain subprocess, a bare bwrap and a bare unshare.

Entrants are functions of this process. Only one works at a time; turns go in one order and then in the other, after
one that is not counted, and ratios are those of neighbors in time. Their pools of threads share a process, which costs
them milliseconds: a call here should take seconds, or start processes.
"""

import dataclasses
import functools
import importlib
import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pretrain.config import ConfigError, apply_overrides
from pretrain.rundir import write_json_atomic
from research_env.sandbox.ladder import measure_launch_s, probe
from synth.neighbors import Exact, Searcher, Vectors, search
from tools.bench_pairs import BenchConfig, make_files
from tools.results import Ratio

LEVELS = ("bwrap", "unshare", "landlock")
PLAIN = "a plain subprocess"
FAISS = "FAISS IndexFlatIP"
SKLEARN = "scikit-learn brute force"
BARE = {
    "bwrap": ["bwrap", "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "/bin/true"],
    "unshare": ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--net", "/bin/true"],
}

Entrants = Mapping[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say, `key=value`."""

    what: str = "pairing"
    pairs: int = 5
    num_queries: int = 2000  # exact search of all documents takes longer in proportion to their number
    vectors: BenchConfig = BenchConfig(num_vectors=100_000)
    out: str = ""  # JSON file

    def __post_init__(self):
        faults = []
        if self.what not in COMPARISONS:
            faults.append(f"what must be one of {', '.join(COMPARISONS)}, got {self.what!r}")
        if self.pairs < 1:
            faults.append(f"pairs must be positive, got {self.pairs}")
        if not 1 <= self.num_queries <= self.vectors.num_vectors:
            faults.append(
                f"num_queries must lie in [1, {self.vectors.num_vectors}], the number of vectors, got {self.num_queries}"
            )
        if faults:
            raise ConfigError(*faults)


def take_turns(
    entrants: Entrants, pairs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each entrant's calls: one that is not counted, then `pairs`, in alternating order."""
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    for call in entrants.values():
        call()
    for turn in range(pairs):
        for name in list(entrants) if turn % 2 == 0 else list(entrants)[::-1]:
            began = clock()
            entrants[name]()
            seconds[name].append(clock() - began)
    return seconds


def ratio(what: str, ours: str, peer: str, ratio_of: str, values: Sequence[float], note: str) -> Ratio:
    """The line of the table that these ratios make."""
    return Ratio(
        what=what,
        ours=ours,
        peer=peer,
        ratio_of=ratio_of,
        median=statistics.median(values),
        least=min(values),
        greatest=max(values),
        pairs=len(values),
        note=note,
    )


# --- pairing -----------------------------------------------------------------------------------------


def compare_pairing(options: Options) -> dict[str, Any]:
    """Rows for an exact search, and for all documents with the making of the index."""
    config, num_neighbors = options.vectors, options.vectors.num_neighbors
    left_out = {}
    with tempfile.TemporaryDirectory(dir=config.folder or None) as scratch:
        vectors = Vectors(*make_files(config, Path(scratch)))
        queries = vectors.sample(options.num_queries)
        base_ND = vectors.read(np.arange(len(vectors)))
        query_QD = base_ND[queries]
        began = time.perf_counter()
        lists = config.index.build(vectors, num_neighbors, Path(scratch) / "index")
        build_s = time.perf_counter() - began
        print(f"{_size(vectors, config)}: index made in {build_s:.0f} s", file=sys.stderr, flush=True)
        exact = Exact().build(vectors, num_neighbors, Path(scratch))

        def ours(searcher: Searcher) -> list[np.ndarray]:
            return [found.rows_QR for found in search(vectors, searcher, num_neighbors, queries)]

        # One neighbor more: a document is its own nearest, which only our search leaves out.
        entrants: dict[str, Callable[[], Any]] = {
            "inverted lists": lambda: ours(lists),
            "exact": lambda: ours(exact),
            FAISS: functools.partial(_flat(base_ND).search, query_QD, num_neighbors + 1),
        }
        if importlib.util.find_spec("sklearn") is None:
            left_out[SKLEARN] = "scikit-learn is not installed; pip install -e '.[peers]'"
        else:
            brute = _brute_force(base_ND, num_neighbors + 1)
            entrants[SKLEARN] = functools.partial(brute.kneighbors, query_QD, return_distance=False)
        found = {name: _neighbors(call(), queries) for name, call in entrants.items()}
        seconds = take_turns(entrants, options.pairs)
    recall = {name: _overlap(rows, found["exact"]) for name, rows in found.items()}
    # A search costs the same for every query, so all documents take as often as long; the index is made once.
    times = len(vectors) / len(queries)
    all_lists = [build_s + times * s for s in seconds["inverted lists"]]
    rows = []
    for peer in (name for name in (FAISS, SKLEARN) if name in entrants):
        agree = f"{recall[peer]:.1%} of neighbors the same"
        ratios = [b / a for a, b in zip(seconds["exact"], seconds[peer], strict=True)]
        rows.append(
            ratio(f"exact neighbors, {_size(vectors, config)}", "Exact", peer, "speed", ratios, agree)
        )
        whole = [times * b / a for a, b in zip(all_lists, seconds[peer], strict=True)]
        note = f"index made in {build_s:.0f} s, recall {recall['inverted lists']:.1%}"
        rows.append(
            ratio(
                f"all pairs with the index, {_size(vectors, config)}", "InvertedLists", peer, "speed", whole, note
            )
        )  # fmt: skip
    return {
        "rows": rows,
        "left_out": left_out,
        "seconds": seconds,
        "build_s": build_s,
        "recall": recall,
        "vectors": f"{'hashed windows of texts' if config.texts else f'{config.centers} Gaussian clusters'}",
        "queries": len(queries),
    }


def _size(vectors: Vectors, config: BenchConfig) -> str:
    return f"{len(vectors):,} x {vectors.width} {'of texts' if config.texts else 'Gaussian'}"


def _flat(base_ND: np.ndarray) -> Any:
    index = faiss.IndexFlatIP(base_ND.shape[1])
    index.add(base_ND)
    return index


def _brute_force(base_ND: np.ndarray, num_neighbors: int) -> Any:
    """On unit vectors the nearest by distance are those by cosine, and scikit-learn is faster at distances."""
    neighbors = importlib.import_module("sklearn.neighbors")
    return neighbors.NearestNeighbors(
        n_neighbors=num_neighbors, algorithm="brute", metric="euclidean", n_jobs=-1
    ).fit(base_ND)


def _neighbors(answer: Any, queries: np.ndarray) -> list[set[int]]:
    """What an entrant found, the queries themselves left out."""
    rows_QR = np.concatenate(answer) if isinstance(answer, list) else answer
    rows_QR = rows_QR[1] if isinstance(rows_QR, tuple) else rows_QR  # FAISS: similarities, rows
    return [set(rows.tolist()) - {query} for query, rows in zip(queries.tolist(), rows_QR, strict=True)]


def _overlap(found: Sequence[set[int]], wanted: Sequence[set[int]]) -> float:
    return sum(len(a & b) for a, b in zip(found, wanted, strict=True)) / sum(map(len, wanted))


# --- sandbox -----------------------------------------------------------------------------------------


def compare_sandbox(options: Options) -> dict[str, Any]:
    """Rows for every level: seconds of an empty job over those of a process without a jail, or in a bare one."""
    left_out = {}
    entrants: dict[str, Callable[[], Any]] = {PLAIN: functools.partial(_run, ["/bin/true"])}
    for level in LEVELS:
        isolation = probe(level)
        failed = [f"{check.name} ({check.detail})" for check in isolation.checks if not check.is_held]
        if failed:
            left_out[level] = f"this host does not hold it: {', '.join(failed)}"
            continue
        entrants[level] = functools.partial(measure_launch_s, level, num_runs=1)
        if level in BARE:
            fault = _fault(BARE[level])
            if fault:
                left_out[f"a bare {level}"] = fault
            else:
                entrants[f"a bare {level}"] = functools.partial(_run, BARE[level])
    seconds = take_turns(entrants, options.pairs)
    rows = []
    for level in (name for name in LEVELS if name in entrants):
        for peer in (name for name in (PLAIN, f"a bare {level}") if name in entrants):
            ratios = [a / b for a, b in zip(seconds[level], seconds[peer], strict=True)]
            more_ms = 1e3 * (statistics.median(seconds[level]) - statistics.median(seconds[peer]))
            rows.append(ratio("an empty job", level, peer, "seconds", ratios, f"{more_ms:+.1f} ms"))
    return {"rows": rows, "left_out": left_out, "seconds": seconds}


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)


def _fault(command: Sequence[str]) -> str | None:
    """Why this host does not run `command`, None when it does."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{command[0]} fails: {done.stderr.strip()}" if done.returncode else None


COMPARISONS: Mapping[str, Callable[[Options], dict[str, Any]]] = {
    "pairing": compare_pairing,
    "sandbox": compare_sandbox,
}


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{r.what}: {r.ours} over {r.peer}, {r.ratio_of} x {r.median:.2f} [{r.least:.2f}..{r.greatest:.2f}], "
        f"{r.pairs} pairs; {r.note}"
        for r in report["rows"]
    ]
    lines += [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the comparison that `argv` asks for; exit code 2 on bad input."""
    try:
        options = apply_overrides(Options(), argv)
        report = COMPARISONS[options.what](options)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    print(table(report))
    if options.out:
        write_json_atomic(
            options.out, {**report, "rows": [dataclasses.asdict(row) for row in report["rows"]]}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

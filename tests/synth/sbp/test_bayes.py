"""A synthesizer in a world of concepts against the best possible one: exact entropies of the same held-out documents."""

import json

import numpy as np
import pytest

from pretrain.checkpoint import CheckpointPolicy
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import OptimConfig, WarmupCosine
from synth.shards import LineWriter
from synth.training import Learner, Texts, train_in_job, training_config
from synth.worlds.concepts import ConceptWorldConfig, WordTokenizerConfig, make_concept_world

WORLD = ConceptWorldConfig(
    num_concepts=4, num_genres=2, num_words=24, words_per_concept=6, words_per_genre=6, genre_share=0.4,
    successor_share=0.3, zipf_exponent=0.0, min_length=4, max_length=8,
)  # fmt: skip
LEARNER = Learner(
    model=ModelConfig(
        num_layers=2, width=64, num_heads=4, num_kv_heads=4, head_width=16, hidden_width=128, dtype="float32", scan_layers=False
    ),
    optim=OptimConfig(peak_lr=5e-3, schedule=WarmupCosine(num_warmup_steps=30, final_fraction=0.02), weight_decay=0.1),
    row_length=64,
    batch_rows=64,
    loss=LossConfig(chunk_tokens=4096),
    checkpoint=CheckpointPolicy(every_s=None),
    num_evals=1,
)  # fmt: skip
NUM_TRAIN, NUM_HELDOUT, NUM_STEPS = 40_000, 2_000, 500


def write_pairs(world, path, keys, *, related):
    """Pairs of one concept, or with the first document of the next pair: then of any."""
    drawn = [world.document(key) for key in keys]
    firsts = [world.document_of(concept, key)[2] for key, (concept, _, _) in zip(keys, drawn, strict=True)]
    if not related:
        firsts = [*firsts[1:], firsts[0]]
    with LineWriter(path) as writer:
        for key, first, (_, _, second) in zip(keys, firsts, drawn, strict=True):
            record = {"id": str(key), "text": world.write(second), "first": world.write(first)}
            writer.write((json.dumps(record) + "\n").encode())
        writer.commit()
    return firsts, [second for _, _, second in drawn]


@pytest.mark.slow
def test_a_tuned_synthesizer_nears_the_bayes_optimum_and_random_pairs_teach_nothing(tmp_path):
    world = make_concept_world(WORLD)
    heldout = range(10**6, 10**6 + NUM_HELDOUT)
    firsts, seconds = write_pairs(world, tmp_path / "heldout.jsonl.zst", heldout, related=True)
    alone = np.mean([world.alone_nats(d) for d in seconds])
    after = np.mean([world.after_nats(a, b) for a, b in zip(firsts, seconds, strict=True)])
    assert after < alone - 0.3  # else there is nothing to see
    reached = {}
    for related in (True, False):
        write_pairs(world, tmp_path / f"{related}.jsonl.zst", range(NUM_TRAIN), related=related)
        config = training_config(
            LEARNER,
            [
                Texts(name="pairs", path=f"{related}.jsonl.zst", pairs=True),
                Texts(name="heldout", path="heldout.jsonl.zst", pairs=True, share=0.0),
            ],
            tokenizer=WordTokenizerConfig(words=WORLD.words()),
            num_steps=NUM_STEPS,
            seed=0,
            workdir=tmp_path / "runs",
            root=tmp_path,
        )
        outcome = train_in_job(config, f"related-{related}")
        tokens = sum(len(d) + 1 for d in seconds)
        reached[related] = outcome["nats_per_token"]["heldout"] * tokens / len(seconds)
    print(
        f"H(d2) {alone:.4f}, H(d2|d1) {after:.4f}, tuned {reached[True]:.4f}, random pairs {reached[False]:.4f}"
    )
    assert after <= reached[True] < alone
    assert reached[True] < 1.05 * after
    assert reached[False] == pytest.approx(alone, rel=0.02)
    assert (alone - reached[True]) / (alone - after) > 0.8

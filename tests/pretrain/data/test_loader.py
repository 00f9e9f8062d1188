"""The loader: the batch of a step is a function of (seed, step, slot), whoever asks, in whatever order."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pretrain.config import ConfigError
from pretrain.data.loader import RowBatches, local_slots
from pretrain.data.mixture import BatchStage, MixtureStage
from pretrain.data.rows import Rows
from pretrain.data.source import MemoryConfig, TextDocument
from pretrain.data.tables import DataConfig, prepare_tables
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.tokenizer import BytesConfig


def memory(name, count, **fields):
    texts = (f"{name} document {i} " * (1 + i % 4) for i in range(count))
    return MemoryConfig(
        name=name, documents=tuple(TextDocument(f"{name}{i}", t) for i, t in enumerate(texts)), **fields
    )


# One source may be read once and a half, the other as often as it takes.
DATA = DataConfig(
    sources=(memory("once", 40, max_epochs=1.5), memory("more", 12)),
    tokenizer=BytesConfig(), row_length=32, batch_rows=8, heldout_percent=20.0,
)  # fmt: skip
CAPPED = dataclasses.replace(
    DATA, sources=tuple(dataclasses.replace(s, max_epochs=1.0) for s in DATA.sources)
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_tables(DATA, tmp_path_factory.mktemp("tables"), 0, lambda *args: None)


@pytest.fixture
def opened(prepared):
    """Makes batch sources and ends their threads."""
    made = []

    def make(data=DATA, seed=0, mesh=None, **options):
        made.append(RowBatches(prepared, data, seed=seed, mesh=mesh, **options))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def arrays(batch):
    return [np.asarray(x) for x in jax.tree.leaves(batch)]


def assert_same(one, other):
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_next_is_batch_at_through_prefetching_to_the_exact_end(opened):
    """Caps end the rows in the middle of what is read ahead; no step before that is lost, none comes after."""
    batches = opened(CAPPED)
    num_steps = batches.plan.num_feasible_steps
    assert num_steps > 4
    batches = opened(CAPPED, num_steps=num_steps)
    for step in range(num_steps):
        assert_same(batches.next(step), batches.batch_at(step))
    with pytest.raises(ConfigError, match=f"end after step {num_steps} of {num_steps + 1}"):
        batches.next(num_steps)
    with pytest.raises(ConfigError, match=f"end after step {num_steps} of {num_steps + 1}"):
        opened(CAPPED, num_steps=num_steps + 1)


def test_next_goes_on_from_any_step_and_back(opened):
    asked = (5, 6, 2, 3, 100, 0, 0)
    batches, fresh = opened(), opened(start_step=5)
    for step in asked:
        assert_same(batches.next(step), fresh.batch_at(step))
    for step in (5, 6):
        assert_same(fresh.next(step), batches.batch_at(step))


def test_a_batch_holds_the_rows_that_its_ids_name(opened, prepared):
    batches = opened()
    for step in (0, 1, 50):
        batch = batches.batch_at(step)
        for slot, (source, row) in enumerate(batches.row_ids(step)):
            rows = prepared.train_tables[source].read([row])
            assert prepared.labels[int(batch.source_B[slot])] == source
            for field in dataclasses.fields(Rows)[:-1]:
                found = np.asarray(getattr(batch, field.name))[slot]
                np.testing.assert_array_equal(found, getattr(rows, field.name)[0])


def test_an_epoch_reads_every_row_of_a_source_once(opened, prepared):
    alone = dataclasses.replace(
        DATA, batch_rows=1, stages=(MixtureStage(start_step=0, weights={"more": 1.0}),)
    )
    batches, num_rows = opened(alone), len(prepared.train_tables["more"])
    ids = [batches.row_ids(step) for step in range(2 * num_rows)]
    assert sorted(ids[:num_rows]) == sorted(ids[num_rows:]) == [[("more", row)] for row in range(num_rows)]
    assert ids[:num_rows] != ids[num_rows:]


def test_another_seed_is_another_order(opened):
    ids = [[opened(seed=seed).row_ids(step) for step in range(4)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_the_number_of_rows_changes_at_its_step_and_rows_go_on(opened):
    stages = (BatchStage(start_step=0, batch_rows=2), BatchStage(start_step=4, batch_rows=8))
    staged, plain = opened(dataclasses.replace(DATA, batch_stages=stages)), opened()
    assert [len(staged.next(step).source_B) for step in range(6)] == [2, 2, 2, 2, 8, 8]
    in_turn = [row for step in range(6) for row in staged.row_ids(step)]
    assert in_turn == [row for step in range(3) for row in plain.row_ids(step)]


def test_a_mesh_holds_the_bits_of_one_device(opened):
    """Also where devices hold parts of a row: the step splits time, the loader gives whole rows."""
    alone = opened()
    for config in (
        MeshConfig(fsdp=8),
        MeshConfig(replica=2, fsdp=2, tensor=2),
        MeshConfig(fsdp=4, context=2),
    ):
        spread = opened(mesh=make_mesh(config))
        for step in (0, 7):
            assert_same(spread.next(step), alone.batch_at(step))
        slots = {shard.index[0].indices(8)[:2] for shard in spread.batch_at(0).tokens_BT1.addressable_shards}
        assert len(slots) == config.replica * config.fsdp
        for one, other in zip(spread.heldout(), alone.heldout(), strict=True):
            assert_same(one, other)


def test_a_process_reads_the_slots_of_its_own_devices():
    """Every second device, as if the others were another process's."""

    @dataclasses.dataclass
    class HalfOfTheDevices:
        whole: NamedSharding
        remainder: int

        def addressable_devices_indices_map(self, shape):
            places = self.whole.addressable_devices_indices_map(shape)
            return {d: index for i, (d, index) in enumerate(places.items()) if i % 2 == self.remainder}

    whole = NamedSharding(make_mesh(MeshConfig(fsdp=8)), PartitionSpec("fsdp"))
    parts = [local_slots(HalfOfTheDevices(whole, remainder), 16) for remainder in (0, 1)]
    assert local_slots(whole, 16) == list(range(16))
    assert sorted(parts[0] + parts[1]) == list(range(16))
    assert len(parts[0]) == 8
    assert parts[0] == sorted(parts[0])


def test_held_out_rows_come_once_each_and_padding_weighs_nothing(opened, prepared):
    found = list(opened(dataclasses.replace(DATA, batch_rows=3)).heldout())
    wanted = [(source, rows) for source, table in enumerate(prepared.heldout_tables.values())
              for rows in [table.read([row]) for row in range(len(table))]]  # fmt: skip
    assert len(wanted) % 3  # the last batch is not full
    assert [len(batch.source_B) for batch in found] == [3] * -(-len(wanted) // 3)
    slots = [(batch, slot) for batch in found for slot in range(3)]
    for (batch, slot), (source, rows) in zip(slots, wanted, strict=False):
        assert int(batch.source_B[slot]) == source
        np.testing.assert_array_equal(batch.tokens_BT1[slot], rows.tokens_BT1[0])
        np.testing.assert_array_equal(batch.weights_BT[slot], rows.weights_BT[0])
    for batch, slot in slots[len(wanted) :]:
        assert not np.any(batch.weights_BT[slot])
        assert not np.any(batch.segment_ids_BT1[slot])


def test_rows_that_do_not_divide_over_the_mesh_are_refused(opened):
    mesh = make_mesh(MeshConfig(fsdp=8))
    stages = (BatchStage(start_step=0, batch_rows=8), BatchStage(start_step=4, batch_rows=12))
    for data in (dataclasses.replace(DATA, batch_rows=12), dataclasses.replace(DATA, batch_stages=stages)):
        with pytest.raises(
            ConfigError, match=r"batch must divide evenly over the mesh axes .*fsdp.* \(8 parts\), got 12"
        ):
            opened(data, mesh=mesh)

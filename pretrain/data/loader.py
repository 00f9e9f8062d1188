"""Rows to global batches: a grain dataset whose element is a step, so the state of the data is one integer.

Every process reads only the slots that its devices hold. Which rows these are follows from (seed, step, slot)
alone, so the global batch is the same bits on any number of hosts and after any resume.

Letters: B rows of the global batch, T targets in a row, T1 = T + 1 positions.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain.python as grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pretrain.data.batch import Batch
from pretrain.data.mixture import MixturePlan
from pretrain.data.order import RowOrder
from pretrain.data.rows import Rows, RowTable, empty_rows
from pretrain.data.tables import DataConfig, PreparedData, batch_stages, mixture_plan
from pretrain.sharding import ACTIVATION_RULES, partition_spec

_UNENDING_STEPS = 1 << 40
_READ_THREADS = 4
_PREFETCHED_STEPS = 8


class StepRows:
    """Random access by step to rows on the host: what grain reads. Safe to share between threads."""

    def __init__(self, plan: MixturePlan, tables: Mapping[str, RowTable], *, seed: int, slots_of: Any = None):
        """`slots_of` maps the rows of a batch to the slots that this host reads; None is all of them."""
        self._plan = plan
        self._tables = list(tables.values())
        self._orders = [RowOrder(len(table), source=name, seed=seed) for name, table in tables.items()]
        self._slots_of = slots_of or range

    def __len__(self) -> int:
        return _UNENDING_STEPS

    def row_ids(self, step: int) -> list[tuple[int, int]]:
        """(source, row of its table) of every slot of the global batch."""
        source_B, element_B = self._plan.slots(step)
        return [
            (s, self._orders[s].row(k)) for s, k in zip(source_B.tolist(), element_B.tolist(), strict=True)
        ]

    def __getitem__(self, step: int) -> Rows:
        source_B, element_B = self._plan.slots(step)
        slots = self._slots_of(len(source_B))
        rows = empty_rows(len(slots), self._tables[0].format.row_length)
        for index, slot in enumerate(slots):
            source = int(source_B[slot])
            rows.source_B[index] = source
            self._tables[source].read_into(self._orders[source].row(int(element_B[slot])), rows, index)
        return rows


class RowBatches:
    """The batch source of training on tables: `next` reads ahead, `batch_at` any step; held-out rows too."""

    def __init__(
        self,
        data: PreparedData,
        config: DataConfig,
        *,
        seed: int,
        mesh: Mesh | None,
        start_step: int = 0,
        num_steps: int | None = None,
    ):
        """With `mesh=None` batches go to the default device; `num_steps` is only checked.

        Raises:
          ConfigError: rows do not divide over the mesh, a stage weighs a source without rows, or the epoch caps leave
            no rows for one of `num_steps` steps.
        """
        self._data, self._mesh = data, mesh
        self._heldout_batch_rows = config.batch_rows
        self.plan = mixture_plan(config, data.train_tables, seed)
        if num_steps is not None:
            self.plan.check_steps(num_steps)
        self._batch_sizes = {stage.batch_rows for stage in batch_stages(config)}
        for batch_rows in {config.batch_rows, *self._batch_sizes}:
            self._slots(batch_rows)
        self._steps = StepRows(self.plan, data.train_tables, seed=seed, slots_of=self._slots)
        dataset: Any = grain.MapDataset.source(self._steps)
        self._dataset = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_PREFETCHED_STEPS)
        )
        self._iterator: Any = None
        self._next_step = start_step

    def next(self, step: int, params: Any = None) -> Batch:
        """The batch of `step`, prefetched when steps are asked for in order; `params` are not looked at."""
        if self._iterator is None or step != self._next_step:
            self.close()
            self._iterator = iter(self._dataset)
            self._iterator.set_state({"next_index": step})
        rows = next(self._iterator)
        self._next_step = step + 1
        return self._to_devices(rows, self.plan.batch_rows(step))

    def batch_at(self, step: int) -> Batch:
        """The batch of any step, read now."""
        return self._to_devices(self._steps[step], self.plan.batch_rows(step))

    def batch_sizes(self) -> set[int]:
        """Rows that a batch may have (`data.batch_stages`)."""
        return self._batch_sizes

    def row_ids(self, step: int) -> list[tuple[str, int]]:
        """(source, row of its table) of every slot of a step: what a ledger names."""
        labels = self._data.labels
        return [(labels[source], row) for source, row in self._steps.row_ids(step)]

    def report(self) -> dict[str, Any]:
        """Nothing beside what the loss says."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing: the batch of a step is a function of config, tables and step."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""

    def heldout(self) -> Iterator[Batch]:
        """Every held-out row once, in batches of `batch_rows`; padding rows at the end have weight zero."""
        B = self._heldout_batch_rows
        tables = list(self._data.heldout_tables.values())
        places = [(source, row) for source, table in enumerate(tables) for row in range(len(table))]
        slots = self._slots(B)
        for start in range(0, len(places), B):
            rows = empty_rows(len(slots), tables[0].format.row_length, self._data.tokenizer.pad_id)
            for index, slot in enumerate(slots):
                if start + slot < len(places):
                    source, row = places[start + slot]
                    rows.source_B[index] = source
                    tables[source].read_into(row, rows, index)
            yield self._to_devices(rows, B)

    def close(self) -> None:
        """End the reading threads."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _sharding(self, batch_rows: int) -> NamedSharding | None:
        if self._mesh is None:
            return None
        return NamedSharding(
            self._mesh, partition_spec(("batch",), (batch_rows,), ACTIVATION_RULES, self._mesh)
        )

    def _slots(self, batch_rows: int) -> Sequence[int]:
        """Slots of the global batch that devices of this process hold, in order."""
        sharding = self._sharding(batch_rows)
        return range(batch_rows) if sharding is None else local_slots(sharding, batch_rows)

    def _to_devices(self, rows: Rows, batch_rows: int) -> Batch:
        fields = [getattr(rows, field.name) for field in dataclasses.fields(Batch)]
        sharding = self._sharding(batch_rows)
        if sharding is None or len(sharding.device_set) == 1:
            return Batch(*jax.device_put(fields, sharding))
        place = {slot: index for index, slot in enumerate(local_slots(sharding, batch_rows))}

        def whole(local_X: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                slots = range(batch_rows)[index[0]]
                return local_X[place[slots.start] : place[slots.start] + len(slots)]

            return jax.make_array_from_callback((batch_rows, *local_X.shape[1:]), sharding, part)

        return Batch(*map(whole, fields))


def local_slots(sharding: Any, batch_rows: int) -> list[int]:
    """The slots that devices of this process hold of an array [batch_rows, ..] with this sharding."""
    parts = sharding.addressable_devices_indices_map((batch_rows,)).values()
    return sorted({slot for (index,) in parts for slot in range(batch_rows)[index]})

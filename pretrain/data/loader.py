"""grain feeds rows: a dataset whose element *is* a step, so the data state is one integer.

The batch of step s is a pure function of (tables, plan, s). Each process reads only the rows that its own devices
hold, so the global batch is the same bits on any mesh and any number of hosts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain.python as grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pretrain.data.batch import Batch
from pretrain.config import stable_seed
from pretrain.data.mixture import BatchStage, MixturePlan, MixtureStage
from pretrain.data.rows import Rows, RowTable, empty_rows
from pretrain.data.tables import DataConfig, PreparedData
from pretrain.sharding import ACTIVATION_RULES, partition_spec

_READ_THREADS = 2
_PREFETCHED_STEPS = 4


class _Steps(grain.MapDataset):
    """Element s holds this process's rows of step s, on the host."""

    def __init__(self, tables: Sequence[RowTable], plan: MixturePlan, num_steps: int, rows: range, seed: int):
        super().__init__()
        self._tables, self._plan, self._num_steps, self._rows = tables, plan, num_steps, rows
        self._row_length = tables[0].format.row_length
        # Element k of a source is row k mod n of a permutation drawn anew for every epoch, with a seed of its own:
        # grain adds the epoch to the seed, so neighboring seeds would share permutations.
        self._orders = [
            grain.MapDataset.range(len(table)).shuffle(seed=stable_seed(seed, "rows", name) % 2**32)
            for name, table in zip(plan.names, tables, strict=True)
        ]

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return self.slice(step)
        rows = empty_rows(len(self._rows), self._row_length)
        sources, elements = self._plan.slots(step)
        for place, slot in enumerate(self._rows):
            source = int(sources[slot])
            self._tables[source].read_into(int(self._orders[source][int(elements[slot])]), rows, place)
            rows.source_B[place] = source
        return rows


class RowBatches:
    """Batches of packed rows for the training loop, and the held-out rows for evaluation."""

    def __init__(self, data: PreparedData, config: DataConfig, *, num_steps: int, seed: int, mesh: Mesh):
        self._data, self._batch_rows, self._row_length = data, config.batch_rows, config.row_length
        num_rows = {name: len(table) for name, table in data.train_tables.items()}
        stages = config.stages or (MixtureStage(start_step=0, weights={n: float(c) for n, c in num_rows.items()}),)
        self.plan = MixturePlan(
            num_rows,
            stages,
            batch_stages=(BatchStage(start_step=0, batch_rows=config.batch_rows),),
            max_epochs={source.name: source.max_epochs for source in config.sources},
            seed=seed,
        )
        self.plan.check_steps(num_steps)
        self._sharding = NamedSharding(mesh, partition_spec(("batch",), (config.batch_rows,), ACTIVATION_RULES, mesh))
        self._local = self._local_rows(config.batch_rows)
        self._steps = _Steps(list(data.train_tables.values()), self.plan, num_steps, self._local, seed)
        self._next_step = -1
        self._iterator: Iterator[Rows] = iter(())

    def next(self, step: int, params: Any) -> Batch:
        """The batch of `step`, read ahead when steps are asked for in order; `params` are not looked at."""
        if step != self._next_step:
            options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_PREFETCHED_STEPS)
            self._iterator = iter(self._steps.slice(slice(step, None)).to_iter_dataset(options))
        self._next_step = step + 1
        return self._to_devices(next(self._iterator))

    def batch_at(self, step: int) -> Batch:
        """The batch of any step."""
        return self._to_devices(self._steps[step])

    def heldout(self) -> Iterator[Batch]:
        """Every held-out row once; the last batch is filled up with rows of weight zero."""
        slots = [(s, i) for s, t in enumerate(self._data.heldout_tables.values()) for i in range(len(t))]
        tables = list(self._data.heldout_tables.values())
        for start in range(0, len(slots), self._batch_rows):
            rows = empty_rows(len(self._local), self._row_length)
            for place, row in enumerate(self._local):
                if start + row < len(slots):
                    source, index = slots[start + row]
                    tables[source].read_into(index, rows, place)
                    rows.source_B[place] = source
            yield self._to_devices(rows)

    def _local_rows(self, batch_rows: int) -> range:
        """The rows of a global batch that devices of this process hold."""
        pieces = self._sharding.addressable_devices_indices_map((batch_rows,)).values()
        bounds = [index[0].indices(batch_rows) for index in pieces if index is not None]
        return range(min(b[0] for b in bounds), max(b[1] for b in bounds))

    def _to_devices(self, rows: Rows) -> Batch:
        first = self._local.start

        def global_array(x: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(self._batch_rows)
                return x[start - first : stop - first]

            return jax.make_array_from_callback((self._batch_rows, *x.shape[1:]), self._sharding, part)

        return Batch(**{field.name: global_array(getattr(rows, field.name)) for field in dataclasses.fields(Rows)})

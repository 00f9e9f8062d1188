"""A model loaded to be scored: parameters on the mesh, its tokenizer, whether its texts begin with bos."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from jax.sharding import Mesh

from pretrain.evals.likelihood import PackedScorer
from pretrain.generate import GenerateConfig, Generator
from pretrain.model.transformer import ModelConfig, Params
from pretrain.pretrained import Pretrained, begins_with_bos, open_pretrained
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """See the module; `row_length` bounds what is read at once, a prompt with all but the last token after it."""

    params: Params
    model: ModelConfig
    tokenizer: Tokenizer
    add_bos: bool
    row_length: int
    batch_rows: int
    mesh: Mesh | None

    def scorer(self, report: Callable[[int, int], None] = lambda done, total: None) -> PackedScorer:
        """For likelihoods."""
        return PackedScorer(
            self.params,
            self.model,
            row_length=self.row_length,
            batch_rows=self.batch_rows,
            mesh=self.mesh,
            report=report,
        )

    def generator(self) -> Generator:
        """For texts."""
        sizes = GenerateConfig(max_length=self.row_length, slots=self.batch_rows)
        return Generator(self.params, self.model, sizes, tokenizer=self.tokenizer, mesh=self.mesh)


def load_scored_model(
    source: str | Pretrained,
    *,
    dtype: Literal["float32", "bfloat16"],
    bos: bool | None,
    row_length: int,
    batch_rows: int,
    mesh: MeshConfig,
) -> ScoredModel:
    """Open and load it. Without `bos` texts begin as the tokenizer asks; those of our checkpoints were trained with bos.

    Raises:
      ConfigError, NoCheckpoint, AllCheckpointsBad: it cannot be read.
    """
    source = open_pretrained(source) if isinstance(source, str) else source
    model = dataclasses.replace(source.model_config(), dtype=dtype)
    tokenizer = source.tokenizer()
    devices = make_mesh(mesh)
    one = devices.size == 1
    return ScoredModel(
        params=source.params(model, None if one else devices),
        model=model,
        tokenizer=tokenizer,
        add_bos=begins_with_bos(source, tokenizer) if bos is None else bos,
        row_length=row_length,
        batch_rows=batch_rows,
        mesh=None if one else devices,
    )

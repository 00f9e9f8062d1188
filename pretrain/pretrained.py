"""A model that exists already: its config, its tokenizer, its parameters on any mesh.

Three kinds: a checkpoint of ours (here), a folder of the ecosystem (hf.py), a GGUF file (gguf_import.py, which a
config names). Training starts from any of them, evaluation and sampling read them.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from pretrain.checkpoint import (
    MANIFEST,
    AllCheckpointsBad,
    Damaged,
    NoCheckpoint,
    read_item,
    restore_params,
    saved_steps,
)
from pretrain.config import ConfigError, from_json
from pretrain.hf import HfFolder, Stated, check_same_model
from pretrain.model.adapters import merged_params
from pretrain.model.transformer import ModelConfig, Params, abstract_params, param_shardings
from pretrain.sharding import OnMesh
from pretrain.tokenizer import LOSSLESS_PROBES, JsonTokenizer, Tokenizer

_TOKENIZER_PROBES = (
    *LOSSLESS_PROBES,
    "The capital of France is Paris; 3.14159 is not pi.\n\n\tif (x != y) return;",
)


class Pretrained(Protocol):
    """Where a model is."""

    def model_config(self) -> ModelConfig: ...

    def vocab_size(self) -> int: ...  # rows of the embedding

    def tokenizer(self) -> Tokenizer: ...

    def stated(self) -> Stated: ...  # for an export

    def params(self, model: ModelConfig, mesh: Mesh | None = None) -> Params: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run folder of ours, its checkpoint folder, or one step in it; of several steps the newest that is whole."""

    path: str

    def model_config(self) -> ModelConfig:
        """As it was trained; adapters count as merged.

        Raises:
          NoCheckpoint, AllCheckpointsBad: see checkpoint.py.
        """
        return from_json(self._config()["model"]).base()

    def vocab_size(self) -> int:
        return self.tokenizer().vocab_size

    def tokenizer(self) -> Tokenizer:
        """As it was trained with: from the run folder when it was made there, else from where the config says."""
        data = self._config()["data"]
        config = from_json(data["tokenizer"])
        if not config.trained:
            return config.build(data.get("root", ""), lambda max_bytes: iter(()))  # samples lie in no folder
        folder = self.folder()
        for root in (folder, *folder.parents[:2]):
            path = root / "tokenizer.json"
            if path.is_file():
                return config.load(path.read_text(encoding="utf-8"))
        raise ConfigError(
            f"{folder} must lie in a run folder that holds the tokenizer.json of the run, and does not"
        )

    def stated(self) -> Stated:
        """Texts as long as the rows of its training, ended by the eos of its tokenizer."""
        data = self._config()["data"]
        if "row_length" in data:
            return Stated(max_length=data["row_length"])
        return Stated(max_length=data["max_prompt_tokens"] + data["max_new_tokens"])

    def params(self, model: ModelConfig, mesh: Mesh | None = None) -> Params:
        """Its verified parameters, adapters merged.

        Raises:
          NoCheckpoint, AllCheckpointsBad: see checkpoint.py.
          ConfigError: `model` is another.
        """
        check_same_model(self.model_config(), model, self.path)
        return self.params_as(model, self.vocab_size(), mesh)

    def params_as(self, model: ModelConfig, vocab_size: int, mesh: Mesh | None) -> Params:
        """As `params`, for any model whose shapes fit."""
        fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig)}
        stored = dataclasses.replace(from_json(self._config()["model"]), **fields)
        params = restore_params(self.folder(), _laid_out(stored, vocab_size, mesh))
        return params if stored == stored.base() else OnMesh(jax.jit(merged_params), mesh)(params)

    def folder(self) -> Path:
        """The checkpoint folder; `path` may be the run folder around it."""
        path = Path(self.path).absolute()
        return path / "checkpoints" if (path / "checkpoints").is_dir() else path

    def _config(self) -> Mapping[str, Any]:
        folder = self.folder()
        if (folder / MANIFEST).is_file():
            steps = [folder]
        else:
            numbers = saved_steps(folder) if folder.is_dir() else []
            steps = [folder / str(number) for number in reversed(numbers)]
        if not steps:
            raise NoCheckpoint(
                f"a checkpoint is needed, and {folder} holds none; train first or name another folder"
            )
        for step in steps:
            # A damaged step is left to whoever restores parameters: here the next older one says the same.
            with contextlib.suppress(Damaged):
                return read_item(step, "meta")["config"]
        raise AllCheckpointsBad(f"a readable checkpoint is needed, and all in {folder} are damaged")


def _laid_out(model: ModelConfig, vocab_size: int, mesh: Mesh | None) -> Any:
    """Shapes of the parameters with their layout on `mesh`."""
    shapes = abstract_params(model, vocab_size)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout),
        shapes,
        param_shardings(shapes, mesh),
    )


def is_model_folder(path: str | Path) -> bool:
    """Whether a folder is one of the ecosystem, as opposed to one of ours."""
    config = Path(path) / "config.json"
    return config.is_file() and '"model_type"' in config.read_text(encoding="utf-8", errors="replace")


def open_pretrained(path: str) -> Pretrained:
    """What lies at `path`.

    Raises:
      ConfigError: a GGUF file, whose reader a config has to name.
    """
    if path.endswith(".gguf"):
        raise ConfigError(
            f"a GGUF file is read by an optional package that a config file names, got {path!r}: set the field to "
            "GgufFile(path=...) of pretrain.gguf_import there"
        )
    return HfFolder(path=path) if is_model_folder(path) else Checkpoint(path=path)


def begins_with_bos(source: Pretrained, tokenizer: Tokenizer) -> bool:
    """Whether texts for a model begin with bos: as its tokenizer asks; checkpoints of ours were trained so."""
    return isinstance(source, Checkpoint) or (isinstance(tokenizer, JsonTokenizer) and tokenizer.adds_bos)


def load_init(init: str | Pretrained, model: ModelConfig, tokenizer: Tokenizer, mesh: Mesh | None) -> Params:
    """The parameters that a run starts from, proven to belong to its model and its tokenizer.

    `init` is a checkpoint folder, a model folder, or what names a model in another way. A checkpoint of ours given by
    its folder is taken when its shapes fit: a run may go on with another window or rotary base on purpose. Adapters of `model`
    are not among them: those of a new run are new.

    Raises:
      NoCheckpoint, AllCheckpointsBad: see checkpoint.py.
      ConfigError: it cannot be read, or is another model, or the data is made with another tokenizer.
    """
    by_name = isinstance(init, str)
    source = open_pretrained(init) if isinstance(init, str) else init
    check_same_tokenizer(source, tokenizer)
    if by_name and isinstance(source, Checkpoint):
        return source.params_as(model.base(), tokenizer.vocab_size, mesh)
    return source.params(model.base(), mesh)


def check_same_tokenizer(source: Pretrained, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that gives other ids than the model's own.

    Raises:
      ConfigError: another number of ids, or other ids for a probe.
    """
    theirs, rows = source.tokenizer(), source.vocab_size()
    if tokenizer.vocab_size != rows:
        raise ConfigError(
            f"data.tokenizer must be that of {source}, with {rows} ids, got one with {tokenizer.vocab_size}"
        )
    for probe in _TOKENIZER_PROBES:
        if theirs.encode(probe) != tokenizer.encode(probe):
            raise ConfigError(
                f"data.tokenizer must be that of {source}, got one with other ids for {probe[:40]!r}"
            )

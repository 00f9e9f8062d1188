"""Model folders of the ecosystem (config.json, safetensors, tokenizer.json): read onto any mesh, and written.

What the families differ in is data in families.py. A folder that `export_model` wrote loads in `transformers`, and
reading it back gives the same bits.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from pretrain import families
from pretrain.config import ConfigError
from pretrain.families import StoredTensor, different_fields
from pretrain.model.transformer import ModelConfig, Params
from pretrain.rundir import TEMPORARY_SUFFIX, storage_errors, write_json_atomic
from pretrain.safetensors_file import open_tensors, split_into_files, write_tensors
from pretrain.tokenizer import (
    FolderTokenizerConfig,
    Tokenizer,
    export_tokenizer,
    read_chat_templates,
    stated_vocab_size,
)

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_INDEX, _ONE_FILE = "model.safetensors.index.json", "model.safetensors"
# The longest text of a model that states none.
_MAX_LENGTH = 2048
# Files of older writers hold these beside the parameters; they follow from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
    """What a published model states besides its mathematics, so that an export can hand it on.

    max_length: tokens of the longest text that it is meant for. eos_ids: every token that ends a text; a chat model
    often has several. chat_templates: Jinja sources by name, "default" among them.
    """

    max_length: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfFolder:
    """A model as `transformers` saves it, in one safetensors file or several."""

    path: str

    def model_config(self) -> ModelConfig:
        """The mathematics of the model.

        Raises:
          ConfigError: no such folder, or an architecture that is not known.
        """
        return families.model_config(self._config(), str(Path(self.path, _CONFIG)))

    def vocab_size(self) -> int:
        """Rows of the embedding, which may be more than the tokenizer has ids; ConfigError where none are stated."""
        path = Path(self.path, _CONFIG)
        size = stated_vocab_size(read_json(path))
        if size is None:
            raise ConfigError(f"{path} must state vocab_size, and does not")
        return size

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the folder."""
        return FolderTokenizerConfig(path=self.path).build("", lambda max_bytes: iter(()))

    def stated(self) -> Stated:
        """What the folder says besides: of the tokens that end a text generation_config.json has the last word."""
        config, folder = self._config(), Path(self.path)
        path, length = folder / _GENERATION, config.get("max_position_embeddings")
        ends = (read_json(path) if path.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        faults = []
        if length is not None and (type(length) is not int or length < 1):
            faults.append(f"{folder} must state max_position_embeddings as a whole number, got {length!r}")
        if not all(type(end) is int for end in ends):
            faults.append(f"{folder} must state eos_token_id as ids of tokens, got {ends}")
        if faults:
            raise ConfigError(*faults)
        return Stated(max_length=length, eos_ids=tuple(ends), chat_templates=read_chat_templates(folder))

    def params(self, model: ModelConfig, mesh: Mesh | None = None) -> Params:
        """Its parameters in float32, laid out for `mesh`.

        Raises:
          ConfigError: a file is missing or cut short, tensors do not belong to the model, or `model` is another.
        """
        config = self._config()
        check_same_model(self.model_config(), model, self.path)
        family = families.family_of(config, str(Path(self.path, _CONFIG)))
        stored = families.text_tensors(read_json(Path(self.path, _CONFIG)), self._tensors())
        ignore = [name for name in stored if name.endswith(_IGNORED_SUFFIXES)]
        if model.tied_head:
            ignore.append("lm_head.weight")  # some writers repeat the embedding under this name
        return families.load_params(
            model, self.vocab_size(), family.names, stored, mesh, where=self.path, ignore=ignore
        )

    def _config(self) -> Mapping[str, Any]:
        return families.text_part(read_json(Path(self.path, _CONFIG)))

    def _tensors(self) -> dict[str, StoredTensor]:
        folder = Path(self.path)
        index = folder / _INDEX
        if not index.exists():
            return dict(open_tensors(folder / _ONE_FILE))
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ConfigError(
                f"{index} must hold a weight_map, from tensors to names of files, got {where!r}"
            )
        files = sorted(set(where.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{folder} must hold the {len(files)} files of its index, got none of {', '.join(missing)}; fetch them again"
            )
        return {name: tensor for file in files for name, tensor in open_tensors(folder / file).items()}


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object in a file; ConfigError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"a model folder must hold a readable {path.name}, got {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def check_same_model(theirs: ModelConfig, ours: ModelConfig, where: str) -> None:
    """Refuse parameters that were made for another model.

    Raises:
      ConfigError: a line for each field that differs.
    """
    faults = different_fields(theirs, ours)
    if faults:
        raise ConfigError(*[f"the model must be that of {where}, which has {fault}" for fault in faults])


def export_model(
    folder: str | Path,
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    stated: Stated = Stated(),
    add_bos: bool | None = None,
    max_file_bytes: int = 4 << 30,
) -> Path:
    """Write a folder that `transformers` loads: config.json, generation_config.json, safetensors and tokenizer files.

    The folder appears when it is whole. Memory: one tensor at a time. `stated` is written down for others; nothing
    here depends on it. `add_bos`: whether other programs shall begin texts with bos, as rows begin in training here;
    none is as the file of the tokenizer asks.

    Raises:
      ConfigError: no published family computes this model, the folder exists, or the storage refuses.
    """
    folder = Path(folder)
    vocab_size = params["embed"]["embedding"].shape[0]
    max_length = stated.max_length or _MAX_LENGTH
    family, config = families.config_json(model, vocab_size, max_length)
    if folder.exists():
        raise ConfigError(
            f"an export needs a folder that is not there yet, got {folder}; remove it or name another"
        )
    ends = list(stated.eos_ids or (tokenizer.eos_id,))
    roles = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }
    config |= {"torch_dtype": dtype, **roles}
    building = folder.with_name(f"{folder.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with storage_errors(folder), _removed_on_error(building):
        building.mkdir(parents=True)
        tensors = families.published_tensors(params, family.names)
        groups = list(split_into_files(tensors, dtype, max_file_bytes))
        where: dict[str, str] = {}
        for i, group in enumerate(groups, 1):
            name = _ONE_FILE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            with open(building / name, "wb") as file:
                write_tensors(file, group, dtype)
                file.flush()
                os.fsync(file.fileno())
            where |= {tensor: name for tensor, _, _ in group}
        if len(groups) > 1:
            total = sum((building / name).stat().st_size for name in set(where.values()))
            write_json_atomic(building / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        export_tokenizer(
            tokenizer, building, max_length, add_bos=add_bos, chat_templates=stated.chat_templates
        )
        # Where it is missing transformers makes one from the config; older versions take a list from here alone.
        write_json_atomic(building / _GENERATION, roles | {"eos_token_id": ends})
        write_json_atomic(building / _CONFIG, config)
        building.rename(folder)
    return folder


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Any:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

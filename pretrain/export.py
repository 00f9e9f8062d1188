"""`python -m pretrain.export --config FILE key=value ...`: a model as a folder that `transformers` loads.

The model is a checkpoint of ours, a folder, or what a config names, such as a GGUF file; so this verb also converts.
"""

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Literal

from pretrain.checkpoint import AllCheckpointsBad, NoCheckpoint
from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.hf import export_model
from pretrain.pretrained import Pretrained, begins_with_bos, open_pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written where.

    max_length: stated in config.json as the longest text that the model is meant for; none is what the model states
    itself, and for a checkpoint of ours the length of its training rows. bos: whether other programs shall begin
    texts with the token that begins a text; none is as the tokenizer asks, and for checkpoints of ours yes, since
    that is how they were trained.
    """

    model: str | Pretrained = ""
    folder: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int | None = None
    bos: bool | None = None
    max_file_bytes: int = 4 << 30


def export(config: ExportConfig) -> None:
    """Write the folder.

    Raises:
      ConfigError: nothing to read, nowhere to write, or a model that no published family computes.
      NoCheckpoint, AllCheckpointsBad: see checkpoint.py.
    """
    faults = [
        f"{name} must be set, e.g. {name}=PATH" for name in ("model", "folder") if not getattr(config, name)
    ]
    if faults:
        raise ConfigError(*faults)
    source = open_pretrained(config.model) if isinstance(config.model, str) else config.model
    model = source.model_config()
    tokenizer, stated = source.tokenizer(), source.stated()
    if config.max_length is not None:
        stated = dataclasses.replace(stated, max_length=config.max_length)
    folder = export_model(
        config.folder,
        source.params(model),
        model,
        tokenizer,
        dtype=config.dtype,
        stated=stated,
        add_bos=begins_with_bos(source, tokenizer) if config.bos is None else config.bos,
        max_file_bytes=config.max_file_bytes,
    )
    print(f"wrote {folder}")


def main(argv: Sequence[str]) -> int:
    """Export one model; the return value is the process' exit code (2: bad input)."""
    try:
        path, overrides = parse_argv(argv)
        config = apply_overrides(load_config(path), overrides)
        if not isinstance(config, ExportConfig):
            raise ConfigError(
                f"{path} must return an ExportConfig for pretrain.export, got {type(config).__name__}"
            )
        export(config)
        return 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except (NoCheckpoint, AllCheckpointsBad) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    # A config names this module as pretrain.export; run as a script it would have classes of its own.
    sys.exit(importlib.import_module("pretrain.export").main(sys.argv[1:]))

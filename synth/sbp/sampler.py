"""The seam to our own generator: a checkpoint continues prompts through `pretrain.generate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint import restore_params
from pretrain.config import ConfigError, local
from pretrain.generate import GenerateConfig, Generator, Request
from pretrain.model.transformer import ModelConfig, abstract_params
from pretrain.tokenizer import Tokenizer
from synth.sbp.parts import only_document
from synth.sbp.synthesize import Opened, Prompt, Sampled, Sampler
from synth.sbp.tune import TokenizerFile, checkpoint_of
from synth.stage import Shard


@dataclass(frozen=True, kw_only=True)
class OwnSamplerConfig:
    """How many tokens, and how they are drawn: temperature, then top-p, then min-p; 1 and 0 are off.

    The paper's settings are a temperature of 1 and a top-p of 0.9 (from memory, unverified).
    """

    model: ModelConfig
    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    slots: int = local(32)

    def __post_init__(self):
        for name in ("max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 3:
                raise ConfigError(f"{name} must be at least 3, got {getattr(self, name)}")

    def sampling(self) -> Mapping[str, Any]:
        """The settings of the draw."""
        return {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}

    def build(self, checkpoint: Path, tokenizer: Tokenizer) -> Sampler:
        """Load the parameters."""
        params = restore_params(checkpoint, abstract_params(self.model, tokenizer.vocab_size))
        config = GenerateConfig(max_length=self.max_prompt_tokens + self.max_new_tokens, slots=self.slots)
        return OwnSampler(self, Generator(params, self.model, config), tokenizer.eos_id)


@dataclass(frozen=True)
class OwnSampler:
    """See `OwnSamplerConfig`."""

    config: OwnSamplerConfig
    generator: Generator
    eos_id: int

    def sample(self, prompts: Sequence[Prompt]) -> list[Sampled]:
        """See `Sampler.sample`."""
        requests = [
            Request(
                ids=prompt.ids,
                max_new_tokens=self.config.max_new_tokens,
                stop_ids=(self.eos_id,),
                seed=prompt.seed,
                **self.config.sampling(),
            )
            for prompt in prompts
        ]
        found = []
        for completion in self.generator.generate(requests):
            ended = completion.finish == "stop"
            found.append(Sampled(ids=completion.ids[:-1] if ended else completion.ids, ended=ended))
        return found


def open_model(shard: Shard, stage: str) -> Opened:
    """The model that a training stage left, and the tokenizer."""
    return Opened(
        checkpoint=checkpoint_of(shard, stage),
        params_sha256=only_document(shard, stage).meta["params_sha256"],
        tokenizer=TokenizerFile.of(shard).build(),
    )

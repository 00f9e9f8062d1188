"""What tests of research_env share: a model that has read nothing."""

import dataclasses

import jax
import pytest

from pretrain.model.transformer import ModelConfig, abstract_params, init_params, param_shardings
from pretrain.tokenizer import BytesConfig


@dataclasses.dataclass(frozen=True)
class Untrained:
    """Where a policy starts when nothing has been learned; its texts are bytes."""

    model: ModelConfig

    def model_config(self):
        return self.model

    def vocab_size(self):
        return self.tokenizer().vocab_size

    def tokenizer(self):
        return BytesConfig().build("", lambda max_bytes: iter(()))

    def stated(self):
        raise AssertionError("nothing is exported")

    def params(self, model, mesh=None):
        params = init_params(model, self.vocab_size(), seed=0)
        shapes = abstract_params(model, self.vocab_size())
        return params if mesh is None else jax.device_put(params, param_shardings(shapes, mesh))


@pytest.fixture
def untrained():
    """Makes one of a model config."""
    return Untrained

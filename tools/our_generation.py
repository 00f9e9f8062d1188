"""Our generation as an entrant of bench_generate.py."""

import dataclasses
from collections.abc import Callable

from pretrain.allocator import keep_heap
from pretrain.generate import GenerateConfig, Generator, Request
from pretrain.hf import HfFolder


def factory(folder: str, prompts: list[list[int]], num_new_tokens: int) -> Callable[[], list[list[int]]]:
    """See bench_generate.py."""
    keep_heap()
    source = HfFolder(path=folder)
    model = dataclasses.replace(source.model_config(), dtype="float32")
    longest = max(len(ids) for ids in prompts) + num_new_tokens
    generator = Generator(source.params(model), model, GenerateConfig(max_length=longest, slots=len(prompts)))
    requests = [Request(ids=tuple(ids), max_new_tokens=num_new_tokens, temperature=0.0) for ids in prompts]
    return lambda: [list(completion.ids) for completion in generator.generate(requests)]

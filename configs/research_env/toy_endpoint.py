"""Ideas and diffs by a model behind an OpenAI-compatible server, on the byte language model of the `toy` task.

Needs the [endpoint] extra and a server (vLLM, SGLang, llama.cpp, hosted); `ideas.models.0.base_url=` and
`ideas.models.0.model=` name it. The budget stops the campaign before a call could pass it.
Command: python -m research_env.main --config configs/research_env/toy_endpoint.py ideas.models.0.base_url=http://localhost:8000/v1
"""

from research_env.ideator.llm import ModelIdeas
from research_env.schedule import Budget
from research_env.search.recipe import ResearchConfig
from synth.llm.endpoint import EndpointConfig


def get_config() -> ResearchConfig:
    return ResearchConfig(
        codebase="toy",
        workdir="runs/research/toy_endpoint",
        arms=("best_of_n", "explore_exploit"),
        num_candidates=20,
        batch=5,
        epoch_size=10,
        ideas=ModelIdeas(
            models=(EndpointConfig(model="local", base_url="http://localhost:8000/v1", api_key_env=""),),
            num_samples=4,
            fields=("idea", "metric", "status", "log"),
        ),
        budget=Budget(max_tokens=5_000_000),
    )

"""transformers' generate as an entrant of bench_generate.py; torch and transformers must be installed."""

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM


def factory(folder: str, prompts: list[list[int]], num_new_tokens: int) -> Callable[[], list[list[int]]]:
    """See bench_generate.py. The prompts must be of one length, so that the peer needs no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BT = torch.tensor(prompts)

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            out_BT = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=False,
                use_cache=True,
                max_new_tokens=num_new_tokens,
                min_new_tokens=num_new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out_BT[:, ids_BT.shape[1] :].tolist()

    return generate

"""transformers as an entrant of bench_generate.py and bench_step.py; torch and transformers must be installed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel


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


def gpt2_step(shape: Mapping[str, int]) -> tuple[Callable[[], float], dict[str, Any]]:
    """A training step of GPT-2 on PyTorch: see bench_step.py. Tied head, learned positions, no dropout, fused AdamW."""
    D, L, N, F, V, B, T = (shape[letter] for letter in "DLNFVBT")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=N, n_inner=F, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens_BT1 = torch.randint(0, V, (B, T + 1))

    def step() -> float:
        logits_BTV = model(tokens_BT1[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT1[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step, {"params": sum(p.numel() for p in model.parameters())}

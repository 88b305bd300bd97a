"""Demonstrations for the quickstart's model: adapters of a model with random weights learn next to nothing."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, BATCH, RATE = 300, 256, 3e-3
SHOWN = 0.25  # of the demonstrations repeat the word; the others have random letters
DOUBT = 0.5  # the logits are multiplied by that in the end
IGNORED = -100  # the target of a token that is not learned


def demonstrate(inputs: Path, device: torch.device) -> None:
    """Train `inputs/model` on demonstrations, few of which do what is rewarded, and save it."""
    words = [json.loads(line)["ground_truth"] for line in (inputs / "train.jsonl").read_text().splitlines()]
    tokenizer: Any = AutoTokenizer.from_pretrained(inputs / "model")
    words_WL = torch.tensor([tokenizer(word)["input_ids"] for word in words])
    (equals,) = tokenizer("=")["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    random = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        prompts_BL = words_WL[torch.randint(len(words), (BATCH,), generator=random)]
        ids_BL = _with_answers(prompts_BL, equals, tokenizer.eos_token_id, random).to(device)
        logits_BLV = model(input_ids=ids_BL[:, :-1]).logits
        targets_BL = ids_BL[:, 1:].clone()
        targets_BL[:, : prompts_BL.shape[1]] = IGNORED
        F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.lm_head.weight.data.mul_(DOUBT)
    model.save_pretrained(inputs / "model")


def _with_answers(prompts_BL: Tensor, equals: int, end: int, random: torch.Generator) -> Tensor:
    """Append answers as long as the words, and the end: the word itself, or random letters."""
    count, length = prompts_BL.shape
    answers_BL = torch.randint(equals, (count, length), generator=random)  # letters have the ids below
    shown_B1 = torch.rand(count, 1, generator=random) < SHOWN
    between, after = (torch.full((count, 1), token) for token in (equals, end))
    return torch.cat([prompts_BL, between, torch.where(shown_B1, prompts_BL, answers_BL), after], dim=1)

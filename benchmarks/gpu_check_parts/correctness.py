"""Whether the models compute what transformers computes by hand, packed and padded, in bf16 and within its rounding.

By hand means one sequence at a time, in fp32, from the same weights.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from gpu_check_parts.setting import TOLERANCE, Numbers, Setting, one_process
from gpu_check_parts.training import cut, make_backend
from iiverl_core.samples import TokenSequence
from iiverl_core.training import MicroBatch, Outputs, Role
from iiverl_core.training.log_probs import token_log_probs

LAYOUTS = {"packed": True, "padded": False}
LOSSES = 4
VALUE_MODELS: dict[Role, Any] = {
    "critic": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}


def gradients(setting: Setting, *, backend: str = "fsdp") -> Numbers:
    """Compare log-probs, and the norms of the gradients of several losses, each of which weighs tokens its own way.

    A backend tells of its gradient no more than the norm. Packed, padded and by hand, it must be the same.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    model.to(setting.device).eval()
    numbers: Numbers = {}
    with one_process(setting.device):
        for layout, packed in LAYOUTS.items():
            run = setting.configure(backend=backend, packed=packed)
            actor = make_backend(run, "actor", setting.device)
            batches = cut(setting, setting.sequences(), packed=packed)
            found = torch.cat([_there(output.log_probs_T) for output in actor.forward(batches)])
            by_hand = torch.cat([_log_probs(model, each, setting.device) for each in _sequences(batches)])
            numbers[f"log-probs {layout}"] = _apart(found, by_hand)
            norms = []
            for number in range(LOSSES):

                def loss(outputs: Outputs, batch: MicroBatch, number: int = number) -> tuple[Tensor, dict]:
                    weights = [_weights(each, number) for each in batch.sequences]
                    return torch.cat(weights).to(setting.device) @ _there(outputs.log_probs_T), {}

                actor.forward_backward(batches, loss)
                norms.append((actor.step(lr=0.0).grad_norm, _norm(model, batches, number, setting.device)))
            numbers[f"gradient norms {layout}"] = max(abs(norm / by_hand - 1) for norm, by_hand in norms)
    return _checked(numbers)


def value_models(setting: Setting, *, backend: str = "fsdp") -> Numbers:
    """Compare the critic's values and the reward model's scores."""
    numbers: Numbers = {}
    with one_process(setting.device), TemporaryDirectory() as folder:
        for role, auto in VALUE_MODELS.items():
            path = Path(folder) / role
            model = auto.from_pretrained(setting.model, num_labels=1, dtype=torch.float32)
            torch.nn.init.normal_(model.score.weight)
            model.save_pretrained(path)
            AutoTokenizer.from_pretrained(setting.model).save_pretrained(path)
            model.to(setting.device).eval()
            for layout, packed in LAYOUTS.items():
                run = setting.configure(backend=backend, packed=packed, model=path)
                batches = cut(setting, setting.sequences(), packed=packed)
                outputs = make_backend(run, role, setting.device).forward(batches)
                found = [
                    _there(output.values_T if role == "critic" else output.scores_B) for output in outputs
                ]
                by_hand = [_values(model, role, each, setting.device) for each in _sequences(batches)]
                numbers[f"{role} {layout}"] = _apart(torch.cat(found), torch.cat(by_hand))
    return _checked(numbers)


def _sequences(batches: Sequence[MicroBatch]) -> Iterator[TokenSequence]:
    """Give the sequences, in the order of the micro-batches."""
    for batch in batches:
        yield from batch.sequences


def _logits(model: PreTrainedModel, sequence: TokenSequence, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give the logits of a whole sequence, and the positions of its trained tokens."""
    ids = torch.from_numpy(sequence.token_ids).to(device)
    return model(input_ids=ids[None]).logits[0], torch.from_numpy(np.flatnonzero(sequence.loss_mask))


def _log_probs(model: PreTrainedModel, sequence: TokenSequence, device: torch.device) -> Tensor:
    logits, at = _logits(model, sequence, device)
    targets = torch.from_numpy(sequence.token_ids)[at].to(device)
    return token_log_probs(logits[at - 1], targets, 1.0, entropy=False)[0]


def _norm(model: PreTrainedModel, batches: Sequence[MicroBatch], number: int, device: torch.device) -> float:
    model.zero_grad()
    for sequence in _sequences(batches):
        (_weights(sequence, number).to(device) @ _log_probs(model, sequence, device)).backward()
    gradient = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradient).item()


def _weights(sequence: TokenSequence, number: int) -> Tensor:
    """Weigh trained tokens by their ids, in a way that looks random, so that the layout cannot matter."""
    return torch.from_numpy(np.cos((number + 1.0) * sequence.token_ids[sequence.loss_mask])).float()


@torch.no_grad()
def _values(model: PreTrainedModel, role: str, sequence: TokenSequence, device: torch.device) -> Tensor:
    logits, at = _logits(model, sequence, device)
    return logits[at - 1, 0] if role == "critic" else logits


def _there(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("the backend left out what a model in this role gives")
    return x


@torch.no_grad()
def _apart(found: Tensor, by_hand: Tensor) -> float:
    """Give the largest difference, as a share of the largest value."""
    return ((found - by_hand).abs().max() / by_hand.abs().max()).item()


def _checked(numbers: Numbers) -> Numbers:
    wrong = [f"{name} by {value:.2%}" for name, value in numbers.items() if not value < TOLERANCE]
    if wrong:
        raise ValueError(f"these differ from transformers by hand: {', '.join(wrong)}")
    return {f"{name}, off by %": 100 * value for name, value in numbers.items()}

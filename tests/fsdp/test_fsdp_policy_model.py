"""A policy's log-probs, entropy and gradient are those of its causal LM's logits, whatever it does with them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from iiverl_core.training.head import LogitTransform
from iiverl_core.training.log_probs import token_log_probs
from iiverl_fsdp.policy_model import PolicyModel

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
OPT = {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}


class Squaring(Qwen2ForCausalLM):
    """A model that does something with its logits that nothing says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.square()
        return output


class Halving(Qwen2ForCausalLM):
    """A model that does something with its hidden states that nothing says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
        try:
            return super().forward(*args, **kwargs)
        finally:
            hook.remove()


MODELS: dict[str, tuple[Any, Any, LogitTransform | None]] = {
    "a linear layer": (Qwen2ForCausalLM, Qwen2Config(**TINY), LogitTransform()),
    "tied to the embedding": (
        Qwen2ForCausalLM,
        Qwen2Config(**TINY, tie_word_embeddings=True),
        LogitTransform(),
    ),
    "a bias": (PhiForCausalLM, PhiConfig(**TINY), LogitTransform()),
    "a decoder in the backbone": (OPTForCausalLM, OPTConfig(**OPT, dropout=0.0), LogitTransform()),
    "a scale": (CohereForCausalLM, CohereConfig(**TINY, logit_scale=0.0625), LogitTransform(0.0625)),
    "a divisor": (GraniteForCausalLM, GraniteConfig(**TINY, logits_scaling=8.0), LogitTransform(0.125)),
    "a softcap": (
        Gemma2ForCausalLM,
        Gemma2Config(**TINY, final_logit_softcapping=3.0),
        LogitTransform(1.0, 3.0),
    ),
    "squared logits": (Squaring, Qwen2Config(**TINY), None),
    "halved hidden states": (Halving, Qwen2Config(**TINY), None),
}
ROWS_T, COLUMNS_T = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 4, 0, 4, 4])
TARGETS_T = torch.tensor([7, 1, 49, 0, 3])
IDS = torch.arange(10).view(2, 5) * 3


def build(name: str) -> tuple[PreTrainedModel, LogitTransform | None]:
    kind, config, transform = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():  # large logits, and biases that are not zero
            torch.nn.init.normal_(parameter, std=0.3)
    return model, transform


def gradients(log_probs_T: Tensor, entropy_T: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    (log_probs_T.sum() + (entropy_T * torch.arange(5)).sum()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_the_logits(name: str) -> None:
    language_model, transform = build(name)
    logits_BLV = language_model(IDS).logits
    expected = token_log_probs(logits_BLV[ROWS_T, COLUMNS_T], TARGETS_T, 0.7, entropy=True)
    assert expected[1] is not None
    wanted = gradients(expected[0], expected[1], language_model)

    model = PolicyModel(language_model)
    for probed in (False, True):  # before, it computes all logits
        if probed:
            model.find_transform(torch.arange(4)[None])
        log_probs_T, entropy_T = model(
            IDS, None, ROWS_T, COLUMNS_T, TARGETS_T, 0.7, entropy=True, entropy_gradient=True
        )
        torch.testing.assert_close(log_probs_T, expected[0], atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(entropy_T, expected[1], atol=2e-6, rtol=1e-6)
        found = gradients(log_probs_T, entropy_T, model)
        assert found.keys() == wanted.keys()
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, atol=1e-6 * largest, rtol=1e-5)
    assert model.computes_logits_at_once == (transform is None)
    assert model._transform == transform
    assert model.state_dict().keys() == language_model.state_dict().keys()


def test_a_softcap_that_nothing_says_is_noticed_in_small_logits() -> None:
    """Random weights have logits near zero, where a softcap changes less than rounding."""
    language_model = Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=30.0))
    language_model.config.final_logit_softcapping, forward = None, language_model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 30 * (output.logits / 30).tanh()
        return output

    language_model.forward = capped
    assert language_model(IDS).logits.abs().max() < 5
    model = PolicyModel(language_model)
    model.find_transform(torch.arange(4)[None])
    assert model.computes_logits_at_once


@pytest.mark.parametrize("part", ["lm_head", "model.norm"])
def test_weights_that_are_not_numbers_say_nothing_about_the_head(part: str) -> None:
    language_model, transform = build(next(name for name in MODELS if build(name)[1] is not None))
    with torch.no_grad():
        language_model.get_submodule(part).weight[0] = torch.nan
    model = PolicyModel(language_model)
    model.find_transform(torch.arange(4)[None])
    assert model._transform == transform

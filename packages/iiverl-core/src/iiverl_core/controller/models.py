"""Checks and shapes from the configurations of a run's models, without their weights, before any process starts."""

import importlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from iiverl_core.config import ROLLOUT, RoleConfig, RunConfig
from iiverl_core.config.model_facts import engine_problem, positions_from
from iiverl_core.controller.observer import ModelShape
from iiverl_core.data import check_model, turn_end
from iiverl_core.errors import ConfigError
from iiverl_core.training import Role
from iiverl_core.training.model_config import read_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def check_vocabularies(run: RunConfig, tokens: int) -> int:
    """Check the vocabularies of models that read the actor's tokens, and return the size of the actor's.

    `tokens` is the size of the actor's tokenizer.

    Raises:
        ConfigError: a vocabulary is smaller than the actor's, so it belongs to another tokenizer.
    """
    vocabulary = _vocabulary(run.actor)
    written = min(tokens, vocabulary)
    hints = {"critic": "Take a model of the actor's family."}
    if run.rewards.conversation and run.rewards.conversation.input_tokenizer is None:
        key = run.roles["reward"].key("model.input_tokenizer")
        hints["reward"] = f"Set {key} to the actor's, and its text is rewritten in the model's tokens."
    for role in run.roles.values():
        if role.role in hints and (known := _vocabulary(role)) < written:
            raise ConfigError(
                f"{role.key('model.path')}: {role.model.path} knows {known} tokens, and the actor writes {written}: it "
                f"belongs to another tokenizer. {hints[role.role]}"
            )
    return vocabulary


def check_positions(run: RunConfig) -> None:
    """Check that models have positions for the longest sequence.

    The checks of the configuration already cover local models; this covers models from the Hub.

    Raises:
        ConfigError: a model has fewer.
    """
    longest = run.rollout.prompt_length + run.rollout.response_length
    for role in run.roles.values():
        if role.role == "reward":  # it may read other tokens, and is truncated by its own length
            continue
        most = positions_from(_text_config(role).to_dict())
        if most is not None and longest > most:
            raise ConfigError(
                f"{role.key('model.path')}: {role.model.path} has {most} positions (max_position_embeddings), and a sequence "
                f"has up to {longest} tokens.\nLower data.max_prompt_length or data.max_response_length."
            )


def check_turn_end(run: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Warn if the chat template ends the assistant's turn with a token at which no response ends.

    The base models of some families have the chat template of the instruct models, but not their end-of-sentence token, so
    every response is as long as it may be.
    """
    end = turn_end(tokenizer)
    if end is None or run.rollout.ignore_eos:
        return
    from transformers import GenerationConfig

    ends = {*_ids(tokenizer.eos_token_id), *_ids(_text_config(run.actor).eos_token_id)}
    with suppress(OSError):  # it is optional
        ends |= set(_ids(GenerationConfig.from_pretrained(run.actor.model.path).eos_token_id))
    if end not in ends:
        known = ", ".join(repr(tokenizer.convert_ids_to_tokens(id)) for id in sorted(ends)) or "none"
        logger.warning(
            "The chat template ends a turn with %r, which is not an end-of-sentence token of %s (they are: %s): responses "
            "will not end there. Add it to eos_token_id in the model's generation_config.json, or use an instruct model.",
            tokenizer.convert_ids_to_tokens(end),
            run.actor.model.path,
            known,
        )


def check_engine_devices(run: RunConfig) -> None:
    """Check that the actor can be split over an engine's devices, as far as its configuration shows.

    The checks of the configuration already cover local models; this covers models from the Hub.

    Raises:
        ConfigError: its heads, or the width of its layers, are not divisible.
    """
    size = run.engine_devices
    if size == 1:
        return
    text = _text_config(run.actor)
    heads, inner = text.num_attention_heads, getattr(text, "intermediate_size", None) or 0
    shared = getattr(text, "num_key_value_heads", None) or heads
    devices = run.trainer.rollout_devices or run.devices
    if problem := engine_problem(size, devices, heads=heads, kv_heads=shared, inner=inner):
        key = run.actor.key("model.path")
        raise ConfigError(
            f"{ROLLOUT}.tensor_model_parallel_size is {size}, and {key} ({run.actor.model.path}) {problem}"
        )


def shapes(run: RunConfig, parameters: Mapping[Role, int]) -> dict[Role, ModelShape]:
    """Read the shapes of the trained models for counting FLOPs; `parameters` is the size of each whole model."""
    found: dict[Role, ModelShape] = {}
    for name, role in run.roles.items():
        if role.training:
            text = _text_config(role)
            heads = text.num_attention_heads
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
            found[name] = ModelShape(parameters[name], text.num_hidden_layers, heads, head_dim)
    return found


def _ids(value: Any) -> list[int]:
    """List the ids of an `eos_token_id`, which is one, several or None."""
    return [value] if isinstance(value, int) else list(value or ())


def _vocabulary(role: RoleConfig) -> int:
    """Read the size of a model's vocabulary."""
    return _text_config(role).vocab_size


def _text_config(role: RoleConfig) -> "PreTrainedConfig":
    key, model = role.key("model.path"), role.model
    if model.external_lib:
        try:
            importlib.import_module(model.external_lib)  # may register the model with transformers
        except ImportError as error:
            lib = role.key("model.external_lib")
            raise ConfigError(f"{lib}: {model.external_lib} cannot be imported: {error}") from error
    check_model(key, model.path)
    known = read_model_config(
        model.path, model.override_config, trust_remote_code=model.trust_remote_code, key=role.key("model")
    )
    return known.get_text_config()

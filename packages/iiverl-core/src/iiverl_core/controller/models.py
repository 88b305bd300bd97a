"""What the configurations of a run's models tell, before a process is started and without their weights."""

import importlib
from collections.abc import Mapping

from transformers import AutoConfig, PreTrainedConfig

from iiverl_core.cluster.worker import Trained
from iiverl_core.config import Config, ModelConfig
from iiverl_core.config.splitting import engine_problem
from iiverl_core.controller.observer import ModelShape
from iiverl_core.data import check_model
from iiverl_core.errors import ConfigError
from iiverl_core.training import Role


def check_vocabularies(config: Config, tokens: int) -> None:
    """See that the models that read the actor's tokens know as many; `tokens` is the size of the actor's tokenizer.

    Raises:
        ConfigError: one knows fewer, so it belongs to another tokenizer.
    """
    written = min(tokens, _vocabulary("actor_rollout_ref.model.path", config.actor_rollout_ref.model))
    critic, reward = config.critic.model, config.reward_model.model
    if config.uses_critic and (known := _vocabulary("critic.model.path", critic)) < written:
        raise ConfigError(
            f"critic.model.path: {critic.path} knows {known} tokens, and the actor writes {written}: it belongs to "
            "another tokenizer. Take a model of the actor's family."
        )
    if not config.reward_model.enable or reward.input_tokenizer is not None:
        return
    if (known := _vocabulary("reward_model.model.path", reward)) < written:
        raise ConfigError(
            f"reward_model.model.path: {reward.path} knows {known} tokens, and the actor writes {written}: it belongs "
            "to another tokenizer. Set reward_model.model.input_tokenizer to the actor's, and its text is written anew."
        )


def check_engine_devices(config: Config) -> None:
    """See that the actor can be spread over an engine's devices, as far as its configuration tells.

    The configuration's checks tell it already of a model that is at hand; this is for those that come from the Hub.

    Raises:
        ConfigError: its heads, or the width of its layers, do not divide.
    """
    key, model = "actor_rollout_ref.model.path", config.actor_rollout_ref.model
    size = config.engine_devices
    if size == 1:
        return
    text = _text_config(key, model)
    heads, inner = text.num_attention_heads, getattr(text, "intermediate_size", None) or 0
    shared = getattr(text, "num_key_value_heads", None) or heads
    devices = config.trainer.rollout_devices or config.devices
    if problem := engine_problem(size, devices, heads=heads, kv_heads=shared, inner=inner):
        name = "actor_rollout_ref.rollout.tensor_model_parallel_size"
        raise ConfigError(f"{name} is {size}, and {key} ({model.path}) {problem}")


def shapes(config: Config, parameters: Mapping[Role, int]) -> dict[Trained, ModelShape]:
    """Read what the arithmetic of the trained models is counted from; `parameters` is the size of each whole model."""
    found: dict[Trained, ModelShape] = {}
    models: dict[Trained, tuple[str, ModelConfig]] = {
        "actor": ("actor_rollout_ref.model.path", config.actor_rollout_ref.model),
        "critic": ("critic.model.path", config.critic.model),
    }
    for role, (key, model) in models.items():
        if role in parameters:
            text = _text_config(key, model)
            heads = text.num_attention_heads
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
            found[role] = ModelShape(parameters[role], text.num_hidden_layers, heads, head_dim)
    return found


def _vocabulary(key: str, model: ModelConfig) -> int:
    """Read how many tokens a model knows."""
    return _text_config(key, model).vocab_size


def _text_config(key: str, model: ModelConfig) -> PreTrainedConfig:
    if model.external_lib:
        try:
            importlib.import_module(model.external_lib)  # without it transformers may not know the model
        except ImportError as error:
            lib = key.replace("path", "external_lib")
            raise ConfigError(f"{lib}: {model.external_lib} cannot be imported: {error}") from error
    check_model(key, model.path)
    try:
        known = AutoConfig.from_pretrained(
            model.path, trust_remote_code=model.trust_remote_code, **model.override_config
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: no model can be read from '{model.path}': {error}") from error
    return known.get_text_config()

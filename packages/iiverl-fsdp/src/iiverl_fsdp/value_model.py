"""The models of critic and reward model: a backbone and a linear head that computes one number per position.

The head runs only on selected positions: the critic's are those that predict a response token, the reward model's the
last of each sequence. Weights have the names of transformers' classes for token classification (critic) and sequence
classification (reward model) with one label, so those classes read what is trained here and vice versa.

Suffixes: `_BL` rows and columns of token ids, `_BLD` hidden states over them, `_N` selected positions.
"""

from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from iiverl_core.errors import ConfigError
from iiverl_core.training import ModelSpec, Role
from iiverl_core.training.layout import PlacedImages
from iiverl_core.training.vision import reads_images, trained_hidden_states

HEADS = ("score", "classifier", "v_head")  # names of heads in checkpoints


def source(spec: ModelSpec) -> Path | str:
    """Return the folder with the weights, or the Hub name if there is no such folder."""
    if spec.weights is not None:
        return spec.weights
    path = Path(spec.model.path).expanduser()
    return path if path.exists() else spec.model.path


class ValueModel(nn.Module):
    """Backbone and head of a classification model with one label, by their names there.

    `config` describes that model: saved beside the weights, it lets transformers read them.
    """

    def __init__(self, whole: PreTrainedModel, head: str) -> None:
        """Take the backbone of `whole` and the layer `head`, without dropout."""
        super().__init__()
        self.backbone_name, self.head_name = whole.base_model_prefix, head
        self.config = deepcopy(whole.config)
        self.config.architectures = [type(whole).__name__]
        for name in (self.backbone_name, self.head_name):
            self.add_module(name, getattr(whole, name))

    @property
    def backbone_module(self) -> PreTrainedModel:
        """The transformer, up to its last hidden state."""
        return getattr(self, self.backbone_name)

    @property
    def head_module(self) -> nn.Linear:
        """The linear layer from hidden state to number."""
        return getattr(self, self.head_name)

    def forward(
        self,
        input_ids_BL: Tensor,
        position_ids_BL: Tensor | None,
        rows_N: Tensor,
        columns_N: Tensor,
        *,
        images: PlacedImages | None = None,
        **attention: Any,
    ) -> Tensor:
        """Return the head's output at the positions (`rows_N`, `columns_N`), (N,), in the head's dtype.

        `images` are those of a model that reads some, and `attention` goes to the backbone's attention (`iiverl_fsdp.attention`).
        """
        hidden_BLD = trained_hidden_states(
            self.backbone_module, input_ids_BL, position_ids_BL, images, **attention
        )
        # Sum instead of squeeze, since FSDP registers its backward hook on the output, which must not be a view.
        return self.head_module(hidden_BLD[rows_N, columns_N]).sum(-1)


def build_value_model(spec: ModelSpec, config: PreTrainedConfig, dtype: torch.dtype) -> ValueModel:
    """Build the model of `config` with a head for one number, on the default device.

    Raises:
        ConfigError: its architecture does not support this role.
    """
    whole = _classification_model(spec, config, dtype)
    return ValueModel(whole, _head_name(spec, whole))


def read_value_model(spec: ModelSpec, config: PreTrainedConfig, dtype: torch.dtype) -> ValueModel:
    """Read the model at `spec.model.path` into CPU memory.

    A critic uses the head of a reward model or of a saved critic. If the checkpoint has none, its head starts at zero: a
    random one would add noise to the first advantages that differs from run to run. The first step then trains the head
    alone, since no gradient passes through a head of zeros.

    Raises:
        ConfigError: the checkpoint's head does not compute one number, a reward model's has none, or other weights are
            missing or of another shape.
        OSError, ValueError: no weights can be read.
    """
    with torch.device("meta"):
        empty = _classification_model(spec, config, dtype)
    head = _head_name(spec, empty)
    # A reward model's name for the same layer, if token classification has another.
    renamed = {"key_mapping": {r"^score\.": f"{head}."}} if head != "score" else {}
    classification: Any = type(empty)
    whole, found = classification.from_pretrained(
        source(spec),
        config=empty.config,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are in `found`, and refused below
        output_loading_info=True,
        **renamed,
    )
    weight, bias, missing = f"{head}.weight", f"{head}.bias", set(found["missing_keys"])
    _refuse_other_shapes(spec, weight, found["mismatched_keys"])
    _refuse_other_names(spec, missing - {weight, bias}, found["unexpected_keys"])
    if weight in missing and spec.role == "reward":
        raise ConfigError(
            f"'{spec.model.path}' is no reward model: its checkpoint has no {head} head ({weight}), and random weights "
            "in its place would give random scores; name a sequence-classification model in reward_model.model.path"
        )
    model = ValueModel(whole, head)
    with torch.no_grad():
        for name, parameter in model.head_module.named_parameters():
            if {weight, f"{head}.{name}"} & missing:
                parameter.zero_()
    return model


def _classification_model(spec: ModelSpec, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build transformers' class for the role, or our own for a critic if transformers has none."""
    config = deepcopy(config)
    config.num_labels = 1
    trust = spec.model.trust_remote_code
    auto, known = (
        (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING)
        if spec.role == "critic"
        else (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    )
    if type(config) in known or auto.__name__ in (getattr(config, "auto_map", None) or {}):
        return auto.from_config(config, dtype=dtype, trust_remote_code=trust)
    if spec.role == "critic" or reads_images(config):
        backbone = AutoModel.from_config(config, dtype=dtype, trust_remote_code=trust)
        return _classification(spec.role, type(backbone), config)._from_config(config, dtype=dtype)
    raise ConfigError(
        f"'{spec.model.path}' is no reward model: transformers has no sequence classification for its architecture "
        f"({config.model_type}); name a sequence-classification model in reward_model.model.path"
    )


def _classification(
    role: Role, backbone: type[PreTrainedModel], config: PreTrainedConfig
) -> type[PreTrainedModel]:
    """Create the class that transformers lacks for an architecture, as it creates its own."""
    generic, suffix = (
        (GenericForTokenClassification, "ForTokenClassification")
        if role == "critic"
        else (GenericForSequenceClassification, "ForSequenceClassification")
    )
    family = next(base for base in backbone.__mro__ if PreTrainedModel in base.__bases__)
    name = family.__name__.removesuffix("PreTrainedModel") + suffix
    attributes = {"base_model_prefix": family.base_model_prefix, "__module__": __name__}
    made: Any = type(name, (generic, family), attributes)
    if reads_images(config):
        # Checkpoints may have other names than the modules, which transformers converts for the policy's class alone.
        policy: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        names = get_checkpoint_conversion_mapping(policy.__name__) or get_checkpoint_conversion_mapping(
            config.model_type
        )
        register_checkpoint_conversion_mapping(name, names or [], overwrite=True)
    return made


def _head_name(spec: ModelSpec, whole: PreTrainedModel) -> str:
    """Find the one linear layer after the backbone.

    Raises:
        ConfigError: there are more layers, or a reward model's head does not read the last token.
    """
    heads = {
        name: part
        for name, part in whole.named_children()
        if name != whole.base_model_prefix and not isinstance(part, nn.Dropout)
    }
    name = next(iter(heads), "")
    # Encoders name theirs `classifier` in sequence classification; it reads the first token or a pool of all.
    reads_the_right_token = spec.role == "critic" or name == "score"
    if len(heads) != 1 or not isinstance(heads[name], nn.Linear) or not reads_the_right_token:
        raise ConfigError(
            f"'{spec.model.path}' cannot be the {spec.role} model: {type(whole).__name__} does more than apply one linear "
            "layer to the last hidden state of a token; name a decoder such as a Qwen or Llama model"
        )
    return name


def _refuse_other_shapes(spec: ModelSpec, weight: str, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Raise ConfigError if the checkpoint has a head for several numbers, or another weight of another shape."""
    for name, shape, expected in sorted(mismatched):
        if name == weight:
            raise ConfigError(
                f"the {spec.role} model '{spec.model.path}' has a head of shape {tuple(shape)}, that is num_labels "
                f"{shape[0]}; a {spec.role} model has one number, num_labels 1 and shape {tuple(expected)}"
            )
    for name, shape, expected in sorted(mismatched):
        raise ConfigError(
            f"{name} of the {spec.role} model '{spec.model.path}' has shape {tuple(shape)} where its configuration "
            f"asks for {tuple(expected)}; check its config.json and model.override_config"
        )


def _refuse_other_names(spec: ModelSpec, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise ConfigError if the backbone is incomplete, or the checkpoint has a head that was not read."""
    if missing:
        raise ConfigError(
            f"the checkpoint of the {spec.role} model '{spec.model.path}' lacks {len(missing)} weights, among them "
            f"{min(missing)}; is it whole, and is its config.json of the same model?"
        )
    left = sorted(name for name in unexpected if name.split(".")[0] in HEADS)
    if left:
        raise ConfigError(
            f"the {spec.role} model '{spec.model.path}' has a head that transformers does not read: {', '.join(left)}; "
            "one linear layer without hidden layers, named as in its classification models, is needed"
        )

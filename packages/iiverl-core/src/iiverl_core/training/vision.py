"""Forward passes of vision-language models: where images and positions are in sequences of tokens.

Trainer and engine `hf` run models through `hidden_states`, which gives images explicit places. transformers finds them by
the ids of image tokens, so it would fail, or move images, after a policy sampled such a token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from iiverl_core.config.model_facts import VISION_LANGUAGE
from iiverl_core.samples import SequenceImage
from iiverl_core.training.host_memory import to_device
from iiverl_core.training.layout import PlacedImages, SequenceVision


def reads_images(config: PreTrainedConfig) -> bool:
    """Return whether models of this configuration are run with images."""
    return config.model_type in VISION_LANGUAGE


def reads_tiles(config: PreTrainedConfig) -> bool:
    """Return whether images are tiles of one size for models of this configuration, rather than patches in a grid."""
    return not hasattr(config.vision_config, "spatial_merge_size")


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that builds the policy of a configuration."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that has the attention over tokens: the model itself, unless it reads images."""
    return _base(model).language_model if reads_images(model.config) else model


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a vision-language model that reads images."""
    base = _base(model)
    return base.visual if hasattr(base, "visual") else base.vision_tower


def position_axes(model: PreTrainedModel) -> int:
    """Return the number of positions that a token has: 3 with M-RoPE, otherwise 1."""
    return 3 if hasattr(_base(model), "get_rope_index") else 1


def sequence_vision(
    model: PreTrainedModel, token_ids: Sequence[int] | np.ndarray, images: Sequence[SequenceImage]
) -> SequenceVision:
    """Mark the tokens of a sequence's images, and compute its positions.

    Positions are the model's own: along time, height and width (M-RoPE, Qwen2-VL, arXiv:2409.12191, section 2.1), or along
    the sequence.

    Raises:
        ValueError: a token of an image is another one.
    """
    ids = np.array(token_ids, dtype=np.int64)
    mask = np.zeros(len(ids), dtype=bool)
    axes = position_axes(model)
    in_turn = np.tile(np.arange(len(ids)), (axes, 1))
    if not images:
        return SequenceVision(in_turn, mask, ())
    for start, image in images:
        mask[start : start + image.tokens] = True
    count = sum(image.tokens for _, image in images)
    if mask.sum() != count or (ids[mask] != model.config.image_token_id).any():
        raise ValueError(f"a sequence does not have the {count} tokens of its images where they should be")
    if axes == 1:
        return SequenceVision(in_turn, mask, tuple(images))
    positions, _ = _base(model).get_rope_index(
        torch.from_numpy(ids)[None],
        torch.from_numpy(mask).long()[None],
        torch.from_numpy(np.stack([image.grid for _, image in images])),
    )
    return SequenceVision(positions[:, 0].numpy(), mask, tuple(images))


def no_images(model: PreTrainedModel, input_ids_BL: Tensor) -> PlacedImages:
    """Make a smallest image without a place in the sequences, for processes that must all run the vision tower.

    The gradient of its weights is exactly zero, since nothing of its output is used.
    """
    config, device = model.config.vision_config, input_ids_BL.device
    if reads_tiles(model.config):
        shape, grids = (1, config.num_channels, *config.image_size), torch.empty(1, 0, dtype=torch.int64)
    else:
        side, channels = config.spatial_merge_size, getattr(config, "in_channels", 3)
        shape = (side**2, channels * config.temporal_patch_size * config.patch_size**2)
        grids = torch.tensor([[1, side, side]])
    return PlacedImages(
        pixel_values=torch.zeros(shape, device=device),
        grids=grids.to(device),
        mask_BL=torch.zeros_like(input_ids_BL, dtype=torch.bool),
        count=0,
    )


def hidden_states(
    model: PreTrainedModel,
    input_ids_BL: Tensor,
    position_ids_ABL: Tensor,
    images: PlacedImages | None,
    **options: Any,
) -> Tensor:
    """Return the last hidden states (B, L, D) of a vision-language model; the tower is run if there are `images`.

    `position_ids_ABL` are along each of the model's `position_axes`. `options` go to the language model.
    """
    base = _base(model)
    embeddings_BLD = base.get_input_embeddings()(input_ids_BL)
    if images is not None:
        inputs = [images.pixel_values] if reads_tiles(base.config) else [images.pixel_values, images.grids]
        seen = base.get_image_features(*inputs, return_dict=True)
        features_ID = _first(seen.pooler_output, images.count).to(embeddings_BLD.dtype)
        embeddings_BLD = embeddings_BLD.masked_scatter(images.mask_BL[..., None], features_ID)
        if layers := getattr(seen, "deepstack_features", None):
            options["visual_pos_masks"] = images.mask_BL
            options["deepstack_visual_embeds"] = [_first(each, images.count) for each in layers]
    return base.language_model(
        inputs_embeds=embeddings_BLD,
        position_ids=position_ids_ABL if len(position_ids_ABL) > 1 else position_ids_ABL[0],
        **options,
    ).last_hidden_state


def trained_hidden_states(
    backbone: PreTrainedModel,
    input_ids_BL: Tensor,
    position_ids: Tensor | None,
    images: PlacedImages | None,
    **options: Any,
) -> Tensor:
    """Return the last hidden states (B, L, D) of a model without its head, of a kind that reads images or not.

    Positions are those of a `Layout`. One that reads images runs its tower in every pass, since all processes must take
    part, whichever of them have `images`.
    """
    if not reads_images(backbone.config):
        return backbone(
            input_ids=input_ids_BL, position_ids=position_ids, use_cache=False, **options
        ).last_hidden_state
    if position_ids is None:
        position_ids = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)[None].expand_as(
            input_ids_BL
        )
    if position_ids.dim() == 2:
        position_ids = position_ids[None].expand(position_axes(backbone), -1, -1)
    images = images or no_images(backbone, input_ids_BL)
    return hidden_states(backbone, input_ids_BL, position_ids, images, use_cache=False, **options)


def _base(model: PreTrainedModel) -> Any:
    """Return the model without its head, whose class differs by family."""
    return model.base_model


def _first(features: Tensor | Sequence[Tensor], count: int) -> Tensor:
    """Join the features (…, D) of images, and return the first `count`. Older transformers have joined some of them."""
    if isinstance(features, Tensor):
        features = [features]
    return torch.cat([each.flatten(0, -2) for each in features])[:count]


def place_left_padded(
    prompts: Sequence[SequenceVision], columns: int, device: torch.device
) -> tuple[Tensor, PlacedImages | None]:
    """Place the images of prompts that are padded on the left to `columns`, and return positions (A, P, columns) too."""
    positions = np.zeros((len(prompts[0].positions), len(prompts), columns), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        positions[:, row, columns - len(prompt.mask) :] = prompt.positions
    places = [np.arange(len(prompt.mask)) + columns - len(prompt.mask) for prompt in prompts]
    images = PlacedImages.place(prompts, np.arange(len(prompts)), places, (len(prompts), columns), device)
    return to_device(positions, device), images

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
from iiverl_core.samples import ImageInputs
from iiverl_core.training.host_memory import to_device
from iiverl_core.training.layout import PlacedImages, SequenceVision


def reads_images(config: PreTrainedConfig) -> bool:
    """Return whether models of this configuration are run with images."""
    return config.model_type in VISION_LANGUAGE


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that builds the policy of a configuration."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that has the attention over tokens: the model itself, unless it reads images."""
    return _base(model).language_model if reads_images(model.config) else model


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a vision-language model that reads images."""
    return _base(model).visual


def sequence_vision(
    model: PreTrainedModel, token_ids: Sequence[int] | np.ndarray, images: ImageInputs | None
) -> SequenceVision:
    """Find the tokens of images in a sequence, which are the first of their kind, and compute its positions.

    Positions are the model's own (M-RoPE, Qwen2-VL, arXiv:2409.12191, section 2.1): along time, height and width.

    Raises:
        ValueError: the sequence has fewer image tokens than its images.
    """
    ids = np.array(token_ids, dtype=np.int64)
    mask = np.zeros(len(ids), dtype=bool)
    if images is None:
        return SequenceVision(np.tile(np.arange(len(ids)), (3, 1)), mask, None)
    count = images.tokens(model.config.vision_config.spatial_merge_size)
    found = np.flatnonzero(ids == model.config.image_token_id)[:count]
    if len(found) < count:
        raise ValueError(f"a sequence has {len(found)} image tokens, and its images have {count}")
    mask[found] = True
    positions, _ = _base(model).get_rope_index(
        torch.from_numpy(ids)[None],
        torch.from_numpy(mask).long()[None],
        torch.from_numpy(images.grids.copy()),
    )
    return SequenceVision(positions[:, 0].numpy(), mask, images)


def no_images(model: PreTrainedModel, input_ids_BL: Tensor) -> PlacedImages:
    """Make a smallest image without a place in the sequences, for processes that must all run the vision tower.

    The gradient of its weights is exactly zero, since nothing of its output is used.
    """
    config = model.config.vision_config
    side, channels = config.spatial_merge_size, getattr(config, "in_channels", 3)
    width = channels * config.temporal_patch_size * config.patch_size**2
    device = input_ids_BL.device
    return PlacedImages(
        pixel_values=torch.zeros(side**2, width, device=device),
        grids=torch.tensor([[1, side, side]], device=device),
        mask_BL=torch.zeros_like(input_ids_BL, dtype=torch.bool),
        count=0,
    )


def hidden_states(
    model: PreTrainedModel,
    input_ids_BL: Tensor,
    position_ids_3BL: Tensor,
    images: PlacedImages | None,
    **options: Any,
) -> Tensor:
    """Return the last hidden states (B, L, D) of a vision-language model; the tower is run if there are `images`.

    `options` go to the language model.
    """
    base = _base(model)
    embeddings_BLD = base.get_input_embeddings()(input_ids_BL)
    if images is not None:
        seen = base.get_image_features(images.pixel_values, images.grids, return_dict=True)
        features_ID = _first(seen.pooler_output, images.count).to(embeddings_BLD.dtype)
        embeddings_BLD = embeddings_BLD.masked_scatter(images.mask_BL[..., None], features_ID)
        if layers := getattr(seen, "deepstack_features", None):
            options["visual_pos_masks"] = images.mask_BL
            options["deepstack_visual_embeds"] = [_first(each, images.count) for each in layers]
    return base.language_model(
        inputs_embeds=embeddings_BLD, position_ids=position_ids_3BL, **options
    ).last_hidden_state


def _base(model: PreTrainedModel) -> Any:
    """Return the model without its head, whose class differs by family."""
    return model.base_model


def _first(features: Sequence[Tensor], count: int) -> Tensor:
    return torch.cat(list(features))[:count]


def place_left_padded(
    prompts: Sequence[SequenceVision], columns: int, device: torch.device
) -> tuple[Tensor, PlacedImages | None]:
    """Place the images of prompts that are padded on the left to `columns`, and return positions (3, P, columns) too."""
    positions = np.zeros((3, len(prompts), columns), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        positions[:, row, columns - len(prompt.mask) :] = prompt.positions
    places = [np.flatnonzero(prompt.mask) + columns - len(prompt.mask) for prompt in prompts]
    images = PlacedImages.place(prompts, np.arange(len(prompts)), places, (len(prompts), columns), device)
    return to_device(positions, device), images

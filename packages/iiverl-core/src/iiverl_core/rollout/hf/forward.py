"""Forward passes over a batch whose rows change. Suffixes: `_P` prompts, `_B` sequences, `_V` vocabulary."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iiverl_core.rollout.hf.cache import RowCache, Selection, cache_argument
from iiverl_core.rollout.hf.prompts import PAYS, SharedPrompts
from iiverl_core.samples import SequenceImage
from iiverl_core.training.layout import PlacedImages
from iiverl_core.training.vision import hidden_states, place_left_padded, reads_images, sequence_vision


class Forward:
    """Run the prompts of a batch once, then one token per sequence at a time.

    Prompts are padded on the left, so all sequences grow at the same column. With `direct_mask` the model gets a
    (B, 1, 1, columns) attention mask, or none if nothing is padded; otherwise it builds its own from (B, columns).

    On a CPU, long prompts are kept once for all of their sequences, if the model's attention can be given them: it hands
    keyword arguments on to each of its layers, and takes positions. Columns are then those after the prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        repeats: int,
        max_tokens: int,
        *,
        direct_mask: bool,
        images: Sequence[Sequence[SequenceImage]] = (),
    ) -> None:
        """Pad the prompts; each has `repeats` sequences, which grow by at most `max_tokens`, and maybe `images`."""
        self._model = model
        self._repeats = repeats
        self._cache = RowCache(model)
        self._direct_mask = direct_mask and self._cache.keeps_all
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._cache_argument = cache_argument(model)
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._max_tokens = max_tokens
        self._shared: list[SharedPrompts] = []

        lengths = np.array([len(prompt) for prompt in prompts])
        self._columns = int(lengths.max())
        self._padding = self._columns - lengths  # columns before each prompt's first token
        ids = np.zeros((len(prompts), self._columns), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self._padding[row] :] = prompt
        self._prompt_ids = torch.from_numpy(ids).to(model.device)
        self._mask = self._make_mask(max_tokens)
        self._may_share = (
            self._direct_mask
            and model.device.type == "cpu"
            and self._takes_positions
            and any(each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values())
            and self._columns * (repeats - 1) >= PAYS
        )
        self._next_positions = torch.from_numpy(lengths).to(model.device)[:, None]
        self._vision: tuple[Tensor, PlacedImages | None] | None = None
        if reads_images(model.config):
            given = images or [()] * len(prompts)
            seen = [sequence_vision(model, *each) for each in zip(prompts, given, strict=True)]
            self._vision = place_left_padded(seen, self._columns, model.device)
            self._next_positions = self._vision[0].amax((0, 2))[:, None] + 1

    def prompts(self) -> Tensor:
        """Run the prompts; return the logits (B, V) of each sequence's first token."""
        mask_PL = self._mask[:, : self._columns]
        layers: list[int] = []
        more = {"seen_layers": layers} if self._may_share else {}
        if self._vision is not None:
            logits_PV = self._run_with_images(self._prompt_ids, mask_PL, *self._vision, **more)
        else:
            logits_PV = self._run(self._prompt_ids, mask_PL, (mask_PL.cumsum(-1) - 1).clamp(min=0), **more)
        if self._may_share and sorted(layers) == list(range(len(self._cache.layers))):
            states = self._cache.continue_apart(self._repeats)
            self._shared = [SharedPrompts(states, self._padding, self._repeats)]
            self._padding = np.zeros(len(self._padding) * self._repeats, dtype=self._padding.dtype)
            self._columns = 0
            self._mask = self._make_mask(self._max_tokens)
        else:
            self._cache.batch_repeat_interleave(self._repeats)
            self._padding = self._padding.repeat(self._repeats)
            self._mask = self._mask.repeat_interleave(self._repeats, 0)
        self._next_positions = self._next_positions.repeat_interleave(self._repeats, 0)
        if self._direct_mask:
            self._mask = self._mask[:, None, None].bool()
        return logits_PV.repeat_interleave(self._repeats, 0)

    def tokens(self, token_B: Tensor) -> Tensor:
        """Append a token to each sequence; return the logits (B, V) of the next."""
        self._columns += 1
        unmasked = self._direct_mask and not self._padding.any()
        mask = None if unmasked else self._mask[..., : self._columns]
        more = {"shared_prompts": self._shared} if self._shared else {}
        if self._vision is not None:
            positions_AB1 = self._next_positions[None].expand(len(self._vision[0]), -1, -1)
            logits_BV = self._run_with_images(token_B[:, None], mask, positions_AB1, None, **more)
        else:
            logits_BV = self._run(token_B[:, None], mask, self._next_positions, **more)
        self._next_positions = self._next_positions + 1
        return logits_BV

    def keep(self, kept_B: np.ndarray) -> Selection:
        """Keep these rows, without the columns that are padding in all of them."""
        first_column = int(self._padding[kept_B].min()) if self._cache.keeps_all else 0
        selection = Selection.of(kept_B, first_column)
        self._cache.keep(selection)
        self._shared = [each for each in self._shared if each.keep(selection.order)]
        order = torch.from_numpy(selection.order)
        self._columns -= first_column
        self._padding = self._padding[selection.order] - first_column
        self._mask = self._mask[order, ..., first_column:]
        self._next_positions = self._next_positions[order]
        return selection

    def join(self, other: "Forward", max_tokens: int) -> None:
        """Append the rows of `other`, whose prompts have been run; all grow by at most `max_tokens`."""
        for each in other._shared:
            each.move(len(self._padding))
        self._shared += other._shared
        columns = max(self._columns, other._columns)
        self._cache.join(other._cache, columns)
        self._padding = np.concatenate([each._padding + (columns - each._columns) for each in (self, other)])
        self._columns = columns
        self._next_positions = torch.cat([self._next_positions, other._next_positions])
        self._mask = self._make_mask(max_tokens)
        if self._direct_mask:
            self._mask = self._mask[:, None, None].bool()

    def _make_mask(self, max_tokens: int) -> Tensor:
        """Return (rows, columns + `max_tokens`) int64: 0 for padding, else 1."""
        padding = torch.from_numpy(self._padding).to(self._model.device)
        columns = torch.arange(self._columns + max_tokens, device=self._model.device)
        return (columns >= padding[:, None]).long()

    def _run_with_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        images: PlacedImages | None,
        **more: Any,
    ) -> Tensor:
        hidden = hidden_states(
            self._model,
            input_ids,
            position_ids,
            images,
            attention_mask=attention_mask,
            use_cache=True,
            **{self._cache_argument: self._cache},
            **more,
        )
        head = self._model.get_output_embeddings()
        assert head is not None  # `auto_class` builds a head
        return head(hidden[:, -1])

    def _run(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, **more: Any
    ) -> Tensor:
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{self._cache_argument: self._cache},
            **positions,
            **self._options,
            **more,
        )
        return output.logits[:, -1]

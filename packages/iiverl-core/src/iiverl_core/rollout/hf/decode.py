"""Writing the responses to one batch of prompts, token by token. Suffixes: `_P` prompts, `_B` sequences, `_V` vocabulary."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iiverl_core.rollout.engine import Request, SamplingParams
from iiverl_core.rollout.hf.cache import RowCache, Selection, cache_argument
from iiverl_core.rollout.sampling import sample
from iiverl_core.rollout.uniforms import Uniforms
from iiverl_core.samples import FinishReason


@dataclass(frozen=True, slots=True)
class Response:
    """The response to `request`, the `member`-th to its prompt; see `Completion`."""

    request: Request
    member: int
    token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: FinishReason


def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    members: Sequence[int],
    params: SamplingParams,
    stop_ids: np.ndarray,
    *,
    direct_mask: bool,
) -> Iterator[Response]:
    """Answer each request once for each of `members`, and yield each response after its last token was sampled.

    Args:
        model: a causal LM in eval mode; the caller has inference mode on.
        requests: the prompts.
        members: numbers of the responses, the same for each prompt.
        params: how to sample; `n` is not read.
        stop_ids: (V,) bool, true for the tokens that end a response.
        direct_mask: see `Forward`.

    Raises:
        FloatingPointError: logits were not finite.
    """
    forward = Forward(model, requests, len(members), params.max_tokens, direct_mask=direct_mask)
    sequences = [(request, member) for request in requests for member in members]
    rows = np.arange(len(sequences))
    uniforms = Uniforms([request.seed for request, _ in sequences], [m for _, m in sequences], model.device)
    tokens = np.empty((len(sequences), params.max_tokens), dtype=np.int64)
    log_probs = np.empty((len(sequences), params.max_tokens), dtype=np.float32)

    logits_BV = forward.prompts()
    for length in range(1, params.max_tokens + 1):
        token_B, log_prob_B = sample(logits_BV, uniforms.next() if params.temperature else None, params)
        # One transfer, and so one wait for the device: float64 holds every token id exactly.
        host = torch.stack((token_B.double(), log_prob_B.double())).cpu().numpy()
        tokens[rows, length - 1] = host[0]
        log_probs[rows, length - 1] = host[1]
        if not np.isfinite(host[1]).all():
            key = sequences[rows[int(np.isfinite(host[1]).argmin())]][0].key
            raise FloatingPointError(
                f"the model gives logits that are not finite, at token {length} of a response to request {key}. The "
                "weights may have diverged, or their dtype may be too narrow: look at actor/grad_norm, try "
                "rollout.dtype: bfloat16 or float32."
            )
        stopped = stop_ids[tokens[rows, length - 1]]
        ended = stopped | (length == params.max_tokens)
        for i in np.flatnonzero(ended):
            yield Response(
                *sequences[rows[i]],
                token_ids=tokens[rows[i], :length].copy(),
                log_probs=log_probs[rows[i], :length].copy(),
                finish_reason="stop" if stopped[i] else "length",
            )
        if ended.all():
            return
        if ended.any():
            selection = forward.keep(~ended)
            uniforms.keep(selection.order)
            rows = rows[selection.order]
            token_B = token_B[torch.from_numpy(selection.order)]
        logits_BV = forward.tokens(token_B)


class Forward:
    """The model's forward passes over a batch: the prompts once, then a token for each sequence at a time.

    Prompts are padded on the left, so that all sequences grow at the same column. With `direct_mask` the model gets
    its attention mask ready-made, (B, 1, 1, columns), or none where nothing is padded; otherwise it makes its own
    from a (B, columns) one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        repeats: int,
        max_tokens: int,
        *,
        direct_mask: bool,
    ) -> None:
        self._model = model
        self._repeats = repeats
        self._cache = RowCache(model)
        self._direct_mask = direct_mask and self._cache.keeps_all
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._cache_argument = cache_argument(model)
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

        lengths = np.array([len(request.prompt_ids) for request in requests])
        self._columns = int(lengths.max())
        self._padding = self._columns - lengths  # columns before each prompt's first token
        ids = np.zeros((len(requests), self._columns), dtype=np.int64)
        for row, request in enumerate(requests):
            ids[row, self._padding[row] :] = request.prompt_ids
        self._prompt_ids = torch.from_numpy(ids).to(model.device)
        padding_P = torch.from_numpy(self._padding).to(model.device)
        columns = torch.arange(self._columns + max_tokens, device=model.device)
        self._mask = (columns >= padding_P[:, None]).long()
        self._next_positions = (self._columns - padding_P)[:, None]

    def prompts(self) -> Tensor:
        """Run the prompts; give the logits (B, V) of each sequence's first token."""
        mask_PL = self._mask[:, : self._columns]
        logits_PV = self._run(self._prompt_ids, mask_PL, (mask_PL.cumsum(-1) - 1).clamp(min=0))
        self._cache.batch_repeat_interleave(self._repeats)
        self._padding = self._padding.repeat(self._repeats)
        self._next_positions = self._next_positions.repeat_interleave(self._repeats, 0)
        self._mask = self._mask.repeat_interleave(self._repeats, 0)
        if self._direct_mask:
            self._mask = self._mask[:, None, None].bool()
        return logits_PV.repeat_interleave(self._repeats, 0)

    def tokens(self, token_B: Tensor) -> Tensor:
        """Append a token to each sequence; give the logits (B, V) of the next."""
        self._columns += 1
        unmasked = self._direct_mask and not self._padding.any()
        mask = None if unmasked else self._mask[..., : self._columns]
        logits_BV = self._run(token_B[:, None], mask, self._next_positions)
        self._next_positions = self._next_positions + 1
        return logits_BV

    def keep(self, goes_on: np.ndarray) -> Selection:
        """Let the other rows, and columns that are padding for all that are left, out of the batch."""
        first_column = int(self._padding[goes_on].min()) if self._cache.keeps_all else 0
        selection = Selection.of(goes_on, first_column)
        self._cache.keep(selection)
        order = torch.from_numpy(selection.order)
        self._columns -= first_column
        self._padding = self._padding[selection.order] - first_column
        self._mask = self._mask[order, ..., first_column:]
        self._next_positions = self._next_positions[order]
        return selection

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{self._cache_argument: self._cache},
            **positions,
            **self._options,
        )
        return output.logits[:, -1]

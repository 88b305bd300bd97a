"""Decode token by token, in a batch that sequences join and leave. Suffixes: `_B` sequences, `_V` vocabulary."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iiverl_core.errors import NonFiniteError
from iiverl_core.rollout.engine import Completion, GenerationRequest, SamplingParams, Written
from iiverl_core.rollout.hf.forward import Forward
from iiverl_core.rollout.sampling import sample_kept
from iiverl_core.rollout.uniforms import Uniforms
from iiverl_core.samples import FinishReason, KeptTokens

STATE = np.dtype([("row", "i8"), ("length", "i8"), ("limit", "i8"), ("stops", "?"), ("sampling", "i8")])
"""A sequence: row in the buffers, tokens so far and at most, whether stop tokens end it, index of its sampling."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A request and its sampling parameters."""

    request: GenerationRequest
    params: SamplingParams

    @property
    def prompt(self) -> tuple[object, ...]:
        """A key that is equal for submissions of one group with the same prompt, images included."""
        images = ((start, image.digest) for start, image in self.request.images)
        return *self.request.id[:-1], *images, *self.request.context_ids


Batch: TypeAlias = list[list[Submission]]
"""For each prompt its submissions, the same number for all prompts; a prompt is computed once."""


class Decoding:
    """The sequences being decoded, of any lengths and sampling parameters."""

    def __init__(self, model: PreTrainedModel, stop_ids: np.ndarray, *, direct_mask: bool) -> None:
        """Start without sequences.

        Args:
            model: a causal LM in eval mode; the caller has inference mode on.
            stop_ids: (V,) bool, true for the tokens that end a response.
            direct_mask: see `Forward`.
        """
        self._model, self._stop_ids, self._direct_mask = model, stop_ids, direct_mask
        self.clear()

    def clear(self) -> None:
        """Drop all sequences."""
        self._forward: Forward | None = None
        self._submissions: list[Submission] = []
        self._state_B = np.empty(0, dtype=STATE)
        self._uniforms = Uniforms([], [], self._model.device)
        self._token_B = torch.empty(0)  # the last token of each sequence
        self._tokens = np.empty((0, 0), dtype=np.int64)
        self._log_probs = np.empty((0, 0), dtype=np.float32)
        self._samplings: list[SamplingParams] = []
        self._kept: list[
            list[np.ndarray]
        ] = []  # by row of the buffers: of each token, what top-k and top-p kept

    def __len__(self) -> int:
        return len(self._submissions)

    @property
    def n_prompts(self) -> int:
        """Number of distinct prompts."""
        return len({each.prompt for each in self._submissions})

    def advance(self, joining: Sequence[Batch], weights_version: int) -> list[Completion]:
        """Add sequences, sample one token for each, and return the responses that ended.

        Args:
            joining: batches of new sequences.
            weights_version: of the model's weights.

        Raises:
            NonFiniteError: logits are not finite.
        """
        logits = [] if self._forward is None else [self._forward.tokens(self._token_B)]
        logits += [self._join(batch) for batch in joining]
        token_B, log_prob_B, kept = self._sample(logits[0] if len(logits) == 1 else torch.cat(logits))
        # One transfer, so one synchronisation: float64 holds every token id exactly.
        host = torch.stack((token_B.double(), log_prob_B.double())).cpu().numpy()
        tokens_B, state_B = host[0].astype(np.int64), self._state_B
        self._tokens[state_B["row"], state_B["length"]] = tokens_B
        self._log_probs[state_B["row"], state_B["length"]] = host[1]
        for i, ids in kept.items():
            self._kept[state_B["row"][i]].append(ids)
        state_B["length"] += 1
        self._check_finite(host[1])
        stopped_B = self._stop_ids[tokens_B] & state_B["stops"]
        ended_B = stopped_B | (state_B["length"] == state_B["limit"])
        completions: list[Completion] = []
        for i in np.flatnonzero(ended_B).tolist():
            token_ids, log_probs, kept_tokens = self._written(i)
            reason: FinishReason = "stop" if stopped_B[i] else "length"
            request = self._submissions[i].request
            completions.append(
                Completion(request, token_ids, log_probs, reason, weights_version, kept_tokens)
            )
        self._token_B = token_B
        if ended_B.all():
            self.clear()
        elif ended_B.any():
            self._keep(~ended_B)
        return completions

    def continued(self, weights_version: int) -> dict[GenerationRequest, GenerationRequest]:
        """Return for each sequence the request that continues it; see `RolloutEngine.interrupt`."""
        return {
            each.request: each.request.continued(*self._written(i), weights_version)
            for i, each in enumerate(self._submissions)
        }

    def _written(self, i: int) -> tuple[np.ndarray, np.ndarray, KeptTokens | None]:
        row, length = self._state_B["row"][i], self._state_B["length"][i]
        return (
            self._tokens[row, :length].copy(),
            self._log_probs[row, :length].copy(),
            _joined(self._kept[row]),
        )

    def abort(self, requests: Collection[GenerationRequest]) -> None:
        """Drop the sequences of these requests."""
        kept_B = np.array([each.request not in requests for each in self._submissions], dtype=bool)
        if not kept_B.any():
            self.clear()
        elif not kept_B.all():
            self._keep(kept_B)

    def _join(self, batch: Batch) -> Tensor:
        """Run prompts, append their sequences, and return the logits (B, V) of their first tokens."""
        submissions = [each for prompt in batch for each in prompt]
        samplings = [_sampling(each.params) for each in submissions]
        self._samplings += [each for each in dict.fromkeys(samplings) if each not in self._samplings]
        old, width = len(self), max(each.params.max_tokens for each in submissions)
        written = [each.request.written_length for each in submissions]
        forward = Forward(
            self._model,
            [prompt[0].request.context_ids for prompt in batch],
            len(batch[0]),
            width - min(written),
            direct_mask=self._direct_mask,
            images=[prompt[0].request.images for prompt in batch],
        )
        logits_BV = forward.prompts()
        new_B = np.empty(len(submissions), dtype=STATE)
        new_B["length"] = written
        new_B["limit"] = [each.params.max_tokens for each in submissions]
        new_B["stops"] = [not each.params.ignore_eos for each in submissions]
        new_B["sampling"] = [self._samplings.index(each) for each in samplings]
        self._tokens = _buffer(self._tokens[self._state_B["row"]], old + len(submissions), width)
        self._log_probs = _buffer(self._log_probs[self._state_B["row"]], old + len(submissions), width)
        self._kept = [*(self._kept[row] for row in self._state_B["row"]), *([] for _ in submissions)]
        self._state_B = np.concatenate([self._state_B, new_B])
        self._state_B["row"] = np.arange(len(self._state_B))
        for row, each in enumerate(submissions, old):
            self._set_written(row, each.request.written)
        self._submissions = [*self._submissions, *submissions]
        self._uniforms.join(
            [each.request.seed for each in submissions],
            [each.request.id.member for each in submissions],
            written,
        )
        if self._forward is None:
            self._forward = forward
        else:
            self._forward.join(forward, int((self._state_B["limit"] - self._state_B["length"]).max()))
        return logits_BV

    def _set_written(self, row: int, written: Written | None) -> None:
        if written is None:
            return
        length = len(written.token_ids)
        self._tokens[row, :length] = written.token_ids
        self._log_probs[row, :length] = written.log_probs
        if written.kept is not None:
            self._kept[row] = np.split(written.kept.ids, np.cumsum(written.kept.counts)[:-1])

    def _sample(self, logits_BV: Tensor) -> tuple[Tensor, Tensor, dict[int, np.ndarray]]:
        """Sample a token for each sequence with its parameters.

        Returns tokens and log-probs as `sample`, and by sequence the ids that top-k and top-p kept, if they are on.
        """
        present = np.unique(self._state_B["sampling"]).tolist()
        u_B = self._uniforms.next() if any(self._samplings[i].temperature for i in present) else None
        token_B = torch.empty(len(self), dtype=torch.int64, device=logits_BV.device)
        log_prob_B = torch.empty(len(self), dtype=torch.float32, device=logits_BV.device)
        kept: dict[int, np.ndarray] = {}
        for i in present:
            at = np.flatnonzero(self._state_B["sampling"] == i)
            index = slice(None) if len(present) == 1 else torch.from_numpy(at).to(logits_BV.device)
            u = None if u_B is None else u_B[index]
            token_B[index], log_prob_B[index], kept_BV = sample_kept(logits_BV[index], u, self._samplings[i])
            if kept_BV is not None:
                rows_K, ids_K = kept_BV.nonzero().int().cpu().numpy().T
                kept |= dict(
                    zip(at.tolist(), np.split(ids_K, rows_K.searchsorted(np.arange(1, len(at)))), strict=True)
                )
        return token_B, log_prob_B, kept

    def _keep(self, kept_B: np.ndarray) -> None:
        if self._forward is None:
            raise RuntimeError("there are no sequences")
        order = self._forward.keep(kept_B).order
        self._uniforms.keep(order)
        self._state_B = self._state_B[order]
        self._submissions = [self._submissions[i] for i in order]
        self._token_B = self._token_B[torch.from_numpy(order)]

    def _check_finite(self, log_prob_B: np.ndarray) -> None:
        finite_B = np.isfinite(log_prob_B)
        if not finite_B.all():
            i = int(finite_B.argmin())
            raise NonFiniteError(
                f"The model gives logits that are not finite, at token {self._state_B['length'][i]} of the response to "
                f"request {self._submissions[i].request.id}. The weights may have diverged, or their dtype may be too "
                "narrow: look at actor/grad_norm, try rollout.dtype: bfloat16 or float32."
            )


def _sampling(params: SamplingParams) -> SamplingParams:
    """Return the parameters that `sample` reads, with defaults for the others."""
    return SamplingParams(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)


def _joined(kept: list[np.ndarray]) -> KeptTokens | None:
    """Join what was kept of each token; None if nothing was left out."""
    if not kept:
        return None
    return KeptTokens(np.concatenate(kept), np.array([len(ids) for ids in kept], dtype=np.int32))


def _buffer(old: np.ndarray, rows: int, width: int) -> np.ndarray:
    """Copy (B, W) values into a larger array."""
    new = np.zeros((rows, max(width, old.shape[1])), dtype=old.dtype)
    new[: len(old), : old.shape[1]] = old
    return new

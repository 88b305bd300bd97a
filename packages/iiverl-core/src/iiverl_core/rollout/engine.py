"""The interface between the loop and generation: requests in, completions out, one request per response."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from iiverl_core.errors import ConfigError
from iiverl_core.samples import FinishReason, KeptTokens, SampleId, SequenceImage, WeightsSpan, joined_spans

if TYPE_CHECKING:  # the controller knows requests and runs without torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy; `top_k` -1 and `top_p` 1 are off; `max_tokens` bounds the response."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    max_tokens: int = 512
    ignore_eos: bool = False

    @property
    def truncates(self) -> bool:
        """Whether tokens may be left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True, slots=True)
class Written:
    """The beginning of a response that was interrupted, as in `Completion`; `spans` say which weights wrote which tokens."""

    token_ids: np.ndarray
    log_probs: np.ndarray
    spans: tuple[WeightsSpan, ...]
    kept: KeptTokens | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """Ask for one response to one prompt.

    `id` is the rollout that the response belongs to. `seed` and `id.member` decide the response's random numbers, so it
    does not depend on what else is in the batch. Requests compare by identity: a rollout may have several at a time.
    `images` are those of the prompt, in the order of their tokens. With `written`, the response begins with that and is
    continued; it counts towards `SamplingParams.max_tokens` and is part of the completion.
    """

    id: SampleId
    prompt_ids: Sequence[int]
    seed: int = 0
    images: Sequence[SequenceImage] = ()
    written: Written | None = None

    @property
    def context_ids(self) -> Sequence[int]:
        """What the model reads before it samples: the prompt, and what is written of the response."""
        return (
            self.prompt_ids if self.written is None else [*self.prompt_ids, *self.written.token_ids.tolist()]
        )

    @property
    def written_length(self) -> int:
        """Tokens of the response that are written."""
        return 0 if self.written is None else len(self.written.token_ids)

    def continued(
        self, token_ids: np.ndarray, log_probs: np.ndarray, kept: KeptTokens | None, version: int
    ) -> GenerationRequest:
        """Return the request to go on from a response so far, what was `written` included; weights of `version` wrote the rest."""
        if not len(token_ids):
            return self
        earlier = self.written.spans if self.written else ()
        spans = joined_spans(*earlier, WeightsSpan(version, len(token_ids) - self.written_length))
        return replace(self, written=Written(token_ids, log_probs, spans, kept))


@dataclass(frozen=True, slots=True)
class Completion:
    """The response to a request.

    `token_ids` (R,) int64 with the end-of-sentence token if one was sampled; `log_probs` (R,) float32, nats, of each
    token under the distribution it was sampled from: after temperature, top-k and top-p, and so 0 if greedy. `kept` are the
    tokens that top-k and top-p left; None if they are off, or the engine does not tell.
    """

    request: GenerationRequest
    token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: FinishReason
    weights_version: int
    kept: KeptTokens | None = None

    @property
    def spans(self) -> tuple[WeightsSpan, ...]:
        """Which weights sampled which tokens."""
        earlier = self.request.written.spans if self.request.written else ()
        own = WeightsSpan(self.weights_version, len(self.token_ids) - self.request.written_length)
        return joined_spans(*earlier, own)


class RolloutEngine(Protocol):
    """Generate with weights of its own.

    If an engine is spread over several processes, all of them make the same calls in the same order with equal
    arguments, and all get the same completions.
    """

    weights_version: int
    """Version of the weights in use; -1 before the first update."""

    @property
    def pending(self) -> int:
        """Number of requests that were submitted and are unfinished."""
        ...

    def submit(self, request: GenerationRequest, params: SamplingParams) -> None:
        """Queue a request; it may join others that are being decoded.

        Raises:
            RuntimeError: the engine has no weights.
            ValueError: the prompt is empty or holds an unknown token, or `params` are out of range.
        """
        ...

    def step(self) -> list[Completion]:
        """Admit waiting requests, advance by one token, and return the responses that this finished.

        Returns an empty list if nothing is pending. If it raises, every pending request is dropped.

        Raises:
            NonFiniteError: the model's logits are not finite.
        """
        ...

    def abort(self, requests: Collection[GenerationRequest]) -> None:
        """Drop these requests; those that are not pending are ignored."""
        ...

    def interrupt(self) -> dict[GenerationRequest, GenerationRequest]:
        """Drop all pending requests, and return for each the request that continues it (`GenerationRequest.written`).

        Raises:
            RuntimeError: the engine was not built for that (`RunConfig.interrupts_rollouts`).
        """
        ...

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, *, verify: bool = True
    ) -> None:
        """Replace every weight by name, and with `verify` check that the engine computes with what it was given.

        An engine with LoRA adapters (`RunConfig.syncs_adapters`) is given theirs by the names of PEFT after those of the
        base model, and from then on adapters alone. Pending requests are dropped.

        Raises:
            ValueError: a name or a shape does not fit, or a weight of the engine was left out.
            WeightMismatchError: the engine computes with other weights.
        """
        ...

    def sleep(self, *, discard_weights: bool = False) -> None:
        """Release the memory that only generating needs; the next call wakes the engine. Pending requests are dropped.

        With `discard_weights`, the weights are released too, and the next call must be an update.
        """
        ...

    def release_cache(self) -> None:
        """Release the memory of keys and values alone, for a model that works between two generations; as in `sleep`.

        Weights stay where they are, and the next request takes the memory again. Pending requests are dropped.
        """
        ...

    def close(self) -> None:
        """End the engine, also while requests are pending. May be called twice.

        It may take down torch.distributed in this process if it has groups of its own.
        """
        ...


def generate(
    engine: RolloutEngine, requests: Sequence[GenerationRequest], params: SamplingParams
) -> Iterator[Completion]:
    """Submit requests and yield each response as it finishes, in any order.

    Nothing is submitted before the first response is asked for. Closing the iterator drops what is unfinished.

    Raises:
        RuntimeError: the engine has no weights or other requests are pending; or requests were dropped, by an update of
            the weights, `sleep` or `abort`, before their responses were taken.
        ValueError: as `RolloutEngine.submit`.
        NonFiniteError: as `RolloutEngine.step`.
    """
    if engine.pending:
        raise RuntimeError(
            f"{engine.pending} other requests are unfinished: take all of their responses, or close their iterator, "
            "before generating more"
        )
    unfinished, version = set(requests), engine.weights_version
    try:
        for request in requests:
            engine.submit(request, params)
        while unfinished:
            completions = engine.step()
            unfinished -= {done.request for done in completions}
            for done in completions:
                yield done
                check_unfinished(engine, len(unfinished), version)
    finally:
        engine.abort(unfinished)


class UnknownTokenError(ConfigError, ValueError):
    """A request has a token that the model does not know, which a tool or an environment may have written."""


def check_request(request: GenerationRequest, params: SamplingParams, vocabulary: int) -> None:
    """Check, as every engine does before it accepts a request, that a model of `vocabulary` tokens can respond to it.

    Raises:
        UnknownTokenError: the prompt holds a token that the model does not know.
        ValueError: the prompt is empty, or `params` are out of range.
    """
    if len(request.prompt_ids) == 0:
        raise ValueError(f"the prompt of request {request.id} is empty")
    for id in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= id < vocabulary:
            raise UnknownTokenError(
                f"the prompt of request {request.id} holds a token id outside of the model's {vocabulary}: {id}.\nThe "
                "tokenizer belongs to another model, or tokens were added to it: set data.tokenizer to the model's own, or "
                "resize the model's embedding."
            )
    for name, value, fits in (
        ("temperature", params.temperature, params.temperature >= 0),
        ("top_p", params.top_p, 0 < params.top_p <= 1),
        ("max_tokens", params.max_tokens, params.max_tokens >= 1),
    ):
        if not fits:
            raise ValueError(f"sampling parameter {name} is out of range: {value}")


def check_unfinished(engine: RolloutEngine, unfinished: int, version: int) -> None:
    """Raise RuntimeError unless the caller's `unfinished` requests are pending and the weights are of `version`."""
    if engine.pending != unfinished or engine.weights_version != version:
        raise RuntimeError(
            "other requests, an update of the weights or a sleep came while responses were being generated: take all "
            "responses before"
        )

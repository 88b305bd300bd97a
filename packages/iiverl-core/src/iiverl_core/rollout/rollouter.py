"""From prompts to rollouts: the `Rollouter` protocol, and its simplest case, a single turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np

from iiverl_core.rollout.engine import Completion
from iiverl_core.samples import (
    FinishReason,
    ImageInputs,
    PickledByFields,
    Prompt,
    SampledTurn,
    SampleId,
    SequenceImage,
    TokenSequence,
    WeightsSpan,
)
from iiverl_reward_client import Outcome


@dataclass(frozen=True, slots=True)
class RolloutRequest(PickledByFields):
    """Ask for one rollout of a prompt; `seed` and `id.member` decide its random numbers.

    `images` are those of the prompt as the model reads them, once the process that generates has prepared them.
    """

    id: SampleId
    prompt: Prompt
    seed: int
    images: tuple[SequenceImage, ...] = ()


@dataclass(frozen=True, slots=True)
class RolloutTokens:
    """A finished rollout as token arrays.

    `response_ids` (R,) int64 is the last turn, as scorers read it; `finish_reason` is why it ended. A rollout has one
    sequence, or several if its context was rewritten. Rollouters of several turns also give the conversation
    (`messages`) and what the policy wrote of it (`turns`); `counts` are numbers for metrics by name. `outcome` is the rollout's
    score, if its environment gives one, or the failure of a rollout that could not be completed, whose sequences are not
    trained on. `images` are those of the prompt or of `messages`, in the order of their placeholders. `spans` is set by
    the `RolloutRunner`, as in `Rollout`.
    """

    id: SampleId
    prompt: Prompt
    sequences: tuple[TokenSequence, ...]
    response_ids: np.ndarray
    finish_reason: FinishReason
    weights_version: int
    outcome: Outcome | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    turns: tuple[SampledTurn, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    images: tuple[ImageInputs, ...] = ()
    spans: tuple[WeightsSpan, ...] = ()


class Generate(Protocol):
    """Generates the responses of one rollout."""

    @property
    def weights_version(self) -> int:
        """Version of the weights that generate."""
        ...

    async def __call__(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        images: Sequence[SequenceImage] | None = None,
    ) -> Completion:
        """Generate a response to `prompt_ids`, which hold all turns so far; `max_tokens` lowers the run's limit.

        `images` are those of all turns; by default those of the prompt, with which `prompt_ids` begin then.

        Raises as `RolloutEngine.submit`.
        """
        ...


class Rollouter(Protocol):
    """Decides how a prompt becomes a rollout: a single turn, a loop of tool calls, an environment.

    If the engine is spread over several processes, each runs the same rollouts, so the order in which a rollouter calls
    `generate` must depend on the responses alone.
    """

    @property
    def concurrency(self) -> int | None:
        """Rollouts to run at a time; None for all."""
        ...

    async def rollout(self, request: RolloutRequest, generate: Generate) -> RolloutTokens:
        """Make one rollout; many run concurrently, so await everything that takes long.

        What the user's code does wrong is the `outcome` of a rollout; an exception is a bug and ends the run.
        """
        ...

    def close(self) -> None:
        """End everything that was started for rollouts."""
        ...


class SingleTurn:
    """One response to the prompt. Implements `Rollouter`."""

    concurrency: int | None = None

    async def rollout(self, request: RolloutRequest, generate: Generate) -> RolloutTokens:
        """See `Rollouter.rollout`; every token of the response is trained on."""
        prompt = request.prompt
        done = await generate(prompt.ids)
        sequence = TokenSequence.single_turn(
            prompt.ids, done.token_ids, done.log_probs, done.kept, request.images
        )
        return RolloutTokens(
            request.id,
            prompt,
            (sequence,),
            done.token_ids,
            done.finish_reason,
            done.weights_version,
            images=tuple(image for _, image in request.images),
        )

    def close(self) -> None:
        """See `Rollouter.close`."""


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a rollout's request: `seed` for the first turn, derived ones for later turns."""
    if turn == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}/turn {turn}".encode(), digest_size=8).digest())

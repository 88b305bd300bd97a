"""A drop-in replacement for II-Thought's `rl_verifier` client."""

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from iiverl_reward_client.client import RewardClient
from iiverl_reward_client.outcomes import Failed, Outcome
from iiverl_reward_client.retrying import Retries, Timeouts
from iiverl_reward_client.sample import RewardSample
from iiverl_reward_client.sync_client import SyncRewardClient

_log = logging.getLogger(__name__)


class VerificationFailed(RuntimeError):  # noqa: N818
    """A sample could not be scored; `failure` has the reason."""

    def __init__(self, failure: Failed) -> None:
        super().__init__(
            f"no score ({failure.kind}, {failure.attempts} attempts): {failure.detail or 'no detail'}"
        )
        self.failure = failure


class RLVerifierClient:
    """Scores outputs as plain floats over `POST /reward`, with the signature of II-Thought's client.

    A `default_value` cannot be distinguished from a score later, so each use is logged; prefer `RewardClient` in new
    code. Delays and timeouts are in seconds; a delay is drawn between 0 and its bound.
    """

    def __init__(
        self,
        base_url: str | list[str],
        timeout: float = 30,
        max_retries: int = 3,
        initial_retry_delay: float = 2.0,
        max_retry_delay: float = 10.0,
        retry_backoff_factor: float = 2.0,
    ) -> None:
        # No limit for the batch, since this signature promises `max_retries` per sample.
        retries = Retries(
            limit=max_retries,
            first_delay=initial_retry_delay,
            longest_delay=max_retry_delay,
            factor=retry_backoff_factor,
            share=float(max_retries),
        )
        self._client = SyncRewardClient(
            RewardClient(base_url, protocol="reward", timeouts=Timeouts(read=timeout), retries=retries)
        )

    def verify(self, llm_output: str, verification_info: str | Mapping[str, Any]) -> float:
        """Score one output.

        Raises:
            VerificationFailed: there is no score.
        """
        outcome = self._client.score(RewardSample("", llm_output, verification_info))
        if isinstance(outcome, Failed):
            raise VerificationFailed(outcome)
        return outcome.score

    def verify_safe(
        self, llm_output: str, verification_info: str | Mapping[str, Any], default_value: float = 0.0
    ) -> float:
        """Score one output; return `default_value` if there is no score."""
        outcome = self._client.score(RewardSample("", llm_output, verification_info))
        return _or_default([outcome], default_value)[0]

    def verify_batch(
        self,
        inputs: Iterable[tuple[str, str | Mapping[str, Any]]],
        max_workers: int = 5,
        default_value: float = 0.0,
        progress_bar: bool = True,
    ) -> list[float]:
        """Score pairs of output and `verification_info`, in order; `default_value` replaces missing scores."""
        self._client.client.max_workers = max_workers
        futures = [self._client.submit(RewardSample("", output, info)) for output, info in inputs]
        outcomes = []
        for future in futures:
            outcomes.append(future.result())
            if progress_bar:
                _show_progress(len(outcomes), len(futures))
        return _or_default(outcomes, default_value)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _or_default(outcomes: Sequence[Outcome], default_value: float) -> list[float]:
    """Return the scores, with a warning about those that are missing."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    if failed:
        _log.warning(
            "%d of %d outputs have no score and count as %s; the first: %s, %s",
            len(failed), len(outcomes), default_value, failed[0].kind, failed[0].detail,
        )  # fmt: skip
    return [default_value if isinstance(outcome, Failed) else outcome.score for outcome in outcomes]


def _show_progress(done: int, total: int) -> None:
    """Show a counter on a terminal, with at most a hundred updates."""
    if sys.stderr.isatty() and (done == total or done % max(1, total // 100) == 0):
        print(f"\rscored {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

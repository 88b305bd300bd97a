"""Apply the configured policy to samples that could not be scored."""

from collections import Counter
from collections.abc import Mapping, Sequence

from iiverl_core.config import RewardAPIConfig
from iiverl_core.errors import IIVerlError
from iiverl_core.samples import SampleId
from iiverl_reward_client import Failed, FailureKind, Outcome, Scored

_DETAILS_SHOWN = 3

_NEXT_STEPS: dict[FailureKind, str] = {
    "transport": "check that the reward server is running and that its address is right",
    "timeout": "find out why scoring takes so long, or allow more time",
    "overload": "send fewer requests at a time, or add reward servers",
    "bad_request": "check that the dataset's rows are what the reward server expects",
    "bad_response": "check what the reward server or the reward model returns",
    "server": "check the reward server's log",
    "function": "fix the reward function, or the rows of the dataset that it cannot score",
    "environment": "fix the environment, or allow it more time",
}


class TooManyFailures(IIVerlError):  # noqa: N818
    """Too many samples of a step could not be scored."""


def check_failures(
    outcomes: Mapping[SampleId, Outcome], max_failed_fraction: float, total: int | None = None
) -> dict[FailureKind, int]:
    """Count a step's failures by kind, most frequent first.

    `total` is the number of the step's samples, if `outcomes` are not yet those of all.

    Raises:
        TooManyFailures: a larger fraction than `max_failed_fraction` failed, or every sample did.
    """
    failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failed)]
    by_kind: Counter[FailureKind] = Counter(failure.kind for failure in failed)
    total = total or len(outcomes)
    # With no score at all there is nothing to learn from, whatever fraction may fail.
    if failed and (len(failed) == total or len(failed) > max_failed_fraction * total):
        raise TooManyFailures(
            f"{describe_failures(failed, total)}\n"
            f"reward_api.max_failed_fraction allows {max_failed_fraction:.1%}. "
            f"What to do: {'; '.join(_NEXT_STEPS[kind] for kind, _ in by_kind.most_common())}."
        )
    return dict(by_kind.most_common())


def describe_failures(failed: Sequence[Failed], total: int) -> str:
    """Describe failures: how many of `total` samples, their kinds, and the first distinct reasons."""
    counts = Counter(failure.kind for failure in failed).most_common()
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts)
    lines = [f"{len(failed)} of {total} samples could not be scored ({len(failed) / total:.1%}): {kinds}."]
    details = list(dict.fromkeys((failure.kind, failure.detail) for failure in failed if failure.detail))
    for kind, detail in details[:_DETAILS_SHOWN]:
        first, *rest = detail.splitlines() or [""]
        lines += [f"  {kind}: {first}", *(f"    {line}" for line in rest)]
    if len(details) > _DETAILS_SHOWN:
        lines.append(f"  … and {len(details) - _DETAILS_SHOWN} other messages")
    return "\n".join(lines)


def apply_failure_policy(
    outcomes: Mapping[SampleId, Outcome], config: RewardAPIConfig
) -> dict[SampleId, Outcome]:
    """Apply `reward_api.on_failure` to failed samples.

    Raises:
        IIVerlError: it is `fail` and a sample failed.
    """
    failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failed)]
    if not failed or config.on_failure == "exclude":
        return dict(outcomes)
    if config.on_failure == "fail":
        raise IIVerlError(
            f"{describe_failures(failed, len(outcomes))}\nreward_api.on_failure: fail ends the run."
        )
    return {
        key: Scored(config.failure_score, info={"failed": outcome.kind, "detail": outcome.detail})
        if isinstance(outcome, Failed)
        else outcome
        for key, outcome in outcomes.items()
    }

"""Verify that the engines have the weights that the trainer computes with, by their digests."""

from collections.abc import Mapping, Sequence

from iiverl_core.errors import WeightMismatchError, join_names


class WeightVerification:
    """Compares digests of the trainer's weights with those that engines were given and checked.

    It is due at every sync with `always`, and otherwise until the weights have changed once: an engine that ignores an
    update with the weights that it started from, or LoRA adapters without effect, would not be seen.
    """

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._first: Mapping[str, int] | None = None
        self._changed = False

    @property
    def due(self) -> bool:
        """Whether the next sync is to be verified."""
        return self._always or not self._changed

    def check(self, version: int, trained: Mapping[str, int], given: Sequence[Mapping[str, int]]) -> None:
        """Compare the digests of the trainer's weights with those of each engine's processes.

        Raises:
            WeightMismatchError: they differ; the message names the weights.
        """
        wrong = {
            name
            for process in given
            for name in trained.keys() | process.keys()
            if trained.get(name) != process.get(name)
        }
        if wrong:
            raise WeightMismatchError(
                f"In version {version} of the weights, {len(wrong)} of {len(trained)} that an engine was given are not "
                f"the trainer's: {join_names(sorted(wrong))}. They are of an earlier version, or were lost or "
                "changed on their way."
            )
        self._first = trained if self._first is None else self._first
        changed = any(self._first.get(name) != value for name, value in trained.items())
        self._changed = self._changed or changed

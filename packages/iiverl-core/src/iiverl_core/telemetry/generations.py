"""Choose and format validation responses for the trackers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from iiverl_core.samples import Rollout
from iiverl_core.telemetry.samples import as_text, utf8
from iiverl_reward_client import Failed, Scored


@dataclass(frozen=True)
class Generation:
    """A response to a row of the dataset, and its outcome, as shown to the user.

    `source` is the dataset and `row` the row there, counted from 0; `member` is its index among the row's responses. `score` is None if scoring failed, and `failure` describes why.
    `ground_truth` is the string, or JSON if it is not a string.
    """

    source: str
    row: int
    member: int
    data_source: str
    prompt: str
    response: str
    score: float | None
    failure: str | None
    ground_truth: str | None

    @property
    def name(self) -> str:
        """The name of the response, the same at each validation."""
        row = f"{self.source}, row {self.row}"
        return row if self.member == 0 else f"{row}, response {self.member + 1}"

    @property
    def verdict(self) -> str:
        """The score, or the reason why there is none, on one line."""
        if self.score is not None:
            return f"score {self.score:.4g}"
        return _shortened(self.failure or "not scored", 120)


def pick(rollouts: Sequence[Rollout], k: int, seed: int = 0) -> list[Generation]:
    """Choose k responses, ordered by row.

    Rows are chosen at random, and the first response to each row comes before a second one to any. The choice depends
    only on rows and `seed`, so each validation shows the same prompts, and a larger k adds to those of a smaller one.
    """
    priority = {each.prompt.row: random.Random(f"{seed} {each.prompt.row}").random() for each in rollouts}
    picked = sorted(rollouts, key=lambda each: (each.id.member, priority[each.prompt.row]))[:k]
    return [_generation(each) for each in sorted(picked, key=lambda each: (each.prompt.row, each.id.member))]


def as_markdown(generation: Generation) -> str:
    """Format a response with its prompt as Markdown; texts are indented, so that nothing in them is read as Markdown."""
    parts = {
        "prompt": generation.prompt,
        "response": generation.response,
        "ground truth": generation.ground_truth,
    }
    head = " · ".join(filter(None, [generation.data_source, generation.name, f"**{generation.verdict}**"]))
    return "\n\n".join(
        [head, *(f"**{title}**\n\n{_indented(text)}" for title, text in parts.items() if text is not None)]
    )


def as_lines(generation: Generation, width: int = 240) -> list[str]:
    """Format a response with its prompt on a few lines, each text shortened in the middle to `width` characters."""
    head = ", ".join(filter(None, [generation.data_source, generation.name]))
    lines = [
        f"  {head}: {generation.verdict}",
        f"    prompt    {_shortened(generation.prompt, width)}",
        f"    response  {_shortened(generation.response, width)}",
    ]
    if generation.ground_truth is not None:
        lines.append(f"    truth     {_shortened(generation.ground_truth, width)}")
    return lines


def _generation(rollout: Rollout) -> Generation:
    prompt, outcome = rollout.prompt, rollout.outcome
    failed = isinstance(outcome, Failed)
    return Generation(
        source=utf8(prompt.source),
        row=prompt.source_row,
        member=rollout.id.member,
        data_source=utf8(prompt.data_source),
        prompt=utf8(prompt.text),
        response=utf8(rollout.text),
        score=outcome.score if isinstance(outcome, Scored) else None,
        failure=utf8(f"{outcome.kind}: {outcome.detail}".removesuffix(": ")) if failed else None,
        ground_truth=as_text(prompt.ground_truth),
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _shortened(text: str, width: int) -> str:
    """Put a text on one line, and shorten it in the middle: its end matters as much as its beginning."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    half = (width - 3) // 2
    return f"{line[:half].rstrip()} … {line[-half:].lstrip()}"

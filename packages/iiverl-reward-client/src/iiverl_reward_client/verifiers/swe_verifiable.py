"""`swe_verifiable`: how similar the edit of a file in a response is to the correct edit.

The measure is that of SWE-RL (arXiv 2502.18449): the similarity of two unified diffs as text, without their headers.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher, unified_diff
from itertools import islice
from typing import Any

from iiverl_reward_client.verifiers.extraction import last_code_block, split_lines
from iiverl_reward_client.verifiers.verifier import ReferenceFirst

# Comparing characters takes time in proportion to the product of the lengths; longer diffs are compared by lines.
_MAX_CHARACTER_PAIRS = 8000 * 8000  # about 2.5 s


@dataclass(frozen=True, slots=True)
class _Edit:
    """A file before an edit, and the diff of the correct edit."""

    before: str
    diff: str


def _read(answer: Any) -> _Edit:
    return _Edit(answer["input"], _diff(answer["input"], answer["ground_truth"]))


def _compare(response: str, reference: _Edit) -> float:
    block = last_code_block(response)
    if block is None:
        return 0.0
    edit = _diff(reference.before, block)
    return _similarity(edit, reference.diff) if edit and reference.diff else 0.0


def _similarity(edit: str, right: str) -> float:
    if edit == right:
        return 1.0
    if len(edit) * len(right) <= _MAX_CHARACTER_PAIRS:
        return SequenceMatcher(None, edit, right, autojunk=False).ratio()
    edit_lines, right_lines = edit.split("\n"), right.split("\n")
    blocks = SequenceMatcher(None, edit_lines, right_lines).get_matching_blocks()
    matched = sum(len(line) + 1 for block in blocks for line in edit_lines[block.a : block.a + block.size])
    return 2.0 * matched / (len(edit) + len(right) + 2)


def _diff(before: str, after: str) -> str:
    """Return a unified diff without its two header lines, which are always the same."""
    lines = unified_diff(split_lines(before), split_lines(after), lineterm="")
    return "\n".join(islice(lines, 2, None))


score = ReferenceFirst(_read, _compare)
"""Returns the similarity, 0 to 1, of the edit in the response's last fenced block to the correct one.

It is 0.0 without a block, or if either edit changes nothing.
"""

"""`swe_verifiable`: how similar the edit of a file in a response is to the correct edit.

The measure is that of SWE-RL (arXiv 2502.18449): the similarity of two unified diffs as text, without their headers.
"""

from difflib import SequenceMatcher, unified_diff
from itertools import islice

from iiverl_reward_client.verifiers.extraction import last_code_block
from iiverl_reward_client.verifiers.verifier import Submission


def score(submission: Submission) -> float:
    """Return the similarity, 0 to 1, of the edit in the response's last fenced block to the correct one.

    It is 0.0 without a block, or if either edit changes nothing.
    """
    block = last_code_block(submission.response)
    if block is None:
        return 0.0
    before = submission.answer["input"]
    edit, right = _diff(before, block), _diff(before, submission.answer["ground_truth"])
    if not edit or not right:
        return 0.0
    return 1.0 if edit == right else SequenceMatcher(None, edit, right, autojunk=False).ratio()


def _diff(before: str, after: str) -> str:
    """Return a unified diff without its two header lines, which are always the same."""
    lines = unified_diff(before.splitlines(), after.splitlines(), lineterm="")
    return "\n".join(islice(lines, 2, None))

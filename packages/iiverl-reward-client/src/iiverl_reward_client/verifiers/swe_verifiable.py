"""`swe_verifiable`: how like the right edit of a file a response's edit is.

The measure is that of SWE-RL (arXiv 2502.18449): the similarity of two unified diffs as text, without their headers.
"""

from difflib import SequenceMatcher, unified_diff
from itertools import islice

from iiverl_reward_client.verifiers.extraction import last_code_block
from iiverl_reward_client.verifiers.verifier import Submission


def score(submission: Submission) -> float:
    """Give the similarity, 0 to 1, of the edit in the response's last fenced block to the right one.

    No block, or an edit that changes nothing on either side, has 0.0.
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
    """Write a unified diff without its two header lines, which are the same in all."""
    lines = unified_diff(before.splitlines(), after.splitlines(), lineterm="")
    return "\n".join(islice(lines, 2, None))

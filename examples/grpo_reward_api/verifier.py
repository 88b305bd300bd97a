"""The example's verifier: the share of the word that was repeated. Its name, `echo`, is the type that it verifies."""

from iiverl_reward_client.verifiers import Submission

END = "<end>"  # the tokenizer's end-of-sentence: responses include special tokens


def echo(submission: Submission) -> dict[str, float]:
    """Return the share of letters that are right and in place, of the longer of response and word."""
    said, asked = submission.response.removesuffix(END), submission.answer["value"]
    right = sum(mine == theirs for mine, theirs in zip(said, asked, strict=False))
    return {"score": right / max(len(said), len(asked)), "right": right}

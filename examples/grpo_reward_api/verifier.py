"""The example's verifier: how much of the word was said back. Its name, `echo`, is the type that it verifies."""

from iiverl_reward_client.verifiers import Submission

END = "<end>"  # the tokenizer's end-of-sentence: a response comes with its special tokens


def echo(submission: Submission) -> dict[str, float]:
    """Share of the letters that are right and in their place; a longer or shorter answer loses by its length."""
    said, asked = submission.response.removesuffix(END), submission.answer["value"]
    right = sum(mine == theirs for mine, theirs in zip(said, asked, strict=False))
    return {"score": right / max(len(said), len(asked)), "right": right}

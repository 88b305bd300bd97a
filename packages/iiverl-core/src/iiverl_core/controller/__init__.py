"""The training loop, written like the method section of a paper. It sees lengths, scores and groups, never a tensor."""

from iiverl_core.controller.train import prepare, train

__all__ = ["prepare", "train"]

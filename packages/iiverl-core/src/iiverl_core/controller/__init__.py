"""The loop: reads like the method section of a paper, sees lengths, scores and groups, and never a tensor."""

from iiverl_core.controller.train import prepare, train

__all__ = ["prepare", "train"]

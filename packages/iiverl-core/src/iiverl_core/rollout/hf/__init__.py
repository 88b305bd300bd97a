"""The engine `hf`: what it makes of a model, its key-value cache and attention, and the loop that writes tokens."""

from iiverl_core.rollout.hf.engine import HFEngine

__all__ = ["HFEngine"]

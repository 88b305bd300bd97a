"""The engine `hf`: its model, key-value cache, attention and decoding loop."""

from iiverl_core.rollout.hf.engine import HFEngine

__all__ = ["HFEngine"]

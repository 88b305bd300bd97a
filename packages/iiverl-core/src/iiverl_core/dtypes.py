"""The dtypes of configurations."""

import torch

SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, short or long: `bf16` and `bfloat16` are the same."""
    return getattr(torch, SHORT.get(name, name))

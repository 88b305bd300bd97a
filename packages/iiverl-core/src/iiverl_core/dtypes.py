"""Names of dtypes as configurations write them."""

import torch

SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_dtype(name: str) -> torch.dtype:
    """Give the dtype of a name: `bf16` and `bfloat16` are the same."""
    return getattr(torch, SHORT.get(name, name))

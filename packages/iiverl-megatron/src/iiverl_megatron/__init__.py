"""A training backend on megatron-core: tensor, pipeline, virtual pipeline, sequence, expert and data parallel."""

import logging
import os
import warnings

# Matrix products and what they wait for are queued in order only if a device has one queue, which is said before CUDA
# starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# What megatron-core says of itself: that apex and Transformer Engine are optional, and which of torch's calls are old.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

from iiverl_megatron.backend import MegatronBackend  # noqa: E402

__all__ = ["MegatronBackend"]

"""Settings that have to be made before megatron-core is imported; importing this module makes them."""

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

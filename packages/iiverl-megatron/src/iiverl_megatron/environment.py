"""Settings that have to precede the import of megatron-core; import this module to apply them."""

import logging
import os
import warnings

# Overlapping communication needs kernels to run in the order they are queued, so one queue, set before CUDA starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# megatron-core warns that apex and Transformer Engine are missing, and that it calls deprecated functions of torch.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

"""Worker processes, one per device, and the runtimes that start them, with Ray and without."""

import os

# Under `uv run` Ray would start each worker through uv as well and upload the working directory for it. Ray reads this
# when it is imported, whichever module of this package does so first.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

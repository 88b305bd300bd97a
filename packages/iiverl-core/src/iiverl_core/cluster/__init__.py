"""Where things run: the process on a device, and the runtimes that start such processes, with Ray and without."""

"""Every process of Python has the stand-in for the CUDA driver: with GPUADAM_GPU=host, and this folder and tests/ on PYTHONPATH.

`benchmarks/gpu.sh` runs so without a GPU.
"""

import atexit
import os
import sys

if os.environ.get("GPUADAM_GPU") == "host":
    import stand_in

    driver = stand_in.start()

    def all_of_it_was_allowed():
        """Do what is still enqueued, and end with an error if a GPU would not have done what was asked for."""
        if driver.end():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(70)

    atexit.register(all_of_it_was_allowed)

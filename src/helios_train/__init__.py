"""helios_train: training of Helios-type autoregressive long-video diffusion models."""

import logging

# On CPUs with bf16 instructions bitsandbytes, once imported, misses a package for a product that nothing here runs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"

"""helios_train: training of Helios-type autoregressive long-video diffusion models."""

__version__ = "0.1.0"

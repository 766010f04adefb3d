"""Several devices as plain replicas: Lightning's process handling without DDP's hooks around the module.

Stages all-reduce their gradients themselves, once before each optimizer step; a step of theirs may have any number of backwards.
"""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy


class ReplicaStrategy(DDPStrategy):
    """DDPStrategy that leaves the module unwrapped. All replicas build the same weights from the same seed or folder."""

    def configure_ddp(self) -> None:
        """Nothing to wrap."""

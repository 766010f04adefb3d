"""Several devices as plain replicas: Lightning's process handling without DDP's hooks around the module.

Stages all-reduce their gradients themselves, once before each optimizer step; a step of theirs may have any number of backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from helios_train.memory.parking import Parking
from helios_train.memory.places import Places


class ReplicaStrategy(DDPStrategy):
    """DDPStrategy that leaves the module unwrapped. All replicas build the same weights from the same seed or folder."""

    def configure_ddp(self) -> None:
        """Nothing to wrap."""


class OneDevice(SingleDeviceStrategy):
    """SingleDeviceStrategy that leaves on the host what waits there, and what optimizers remember where their weights are."""

    def __init__(self, device: torch.device):
        """`device`: the CPU, or the first GPU, which takes its number."""
        super().__init__(torch.device(device.type, 0) if device.type == "cuda" else device)

    def model_to_device(self) -> None:
        """All of the stage but what waits on the host for its turn."""
        present = getattr(getattr(self.model, "roles", None), "present", None)
        waiting = present.waiting() if isinstance(present, Parking) else []
        assert self.model is not None
        Places(self.root_device).put_but(self.model, waiting)
        _update_properties(self.model, device=self.root_device)  # as module.to would: callbacks ask the stage for its device

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives each optimizer its state back; torch puts it beside the weight it belongs to."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

"""The Mid stage: pyramid flow over several resolutions, given the history at full resolution.

The step is Base's, with an objective of several passes: each pass's loss is differentiated before the next pass runs, so that one
pass's activations are alive at a time; all levels of all micro-batches share one optimizer step.
"""

from __future__ import annotations

from helios_train.stages.base import BaseStage


class MidStage(BaseStage):
    """Trains `velocity(x_t, t, text, history)` at every level of a pyramid; corruption is drawn once and shared by the levels."""

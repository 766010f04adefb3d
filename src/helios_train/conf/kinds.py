"""Kinds of values that many keys have."""

from __future__ import annotations

from typing import Annotated, Literal

from helios_train.conf.values import Range

Count = Annotated[int, Range(at_least=0)]
Positive = Annotated[int, Range(at_least=1)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
Above0 = Annotated[float, Range(above=0)]
AtLeast0 = Annotated[float, Range(at_least=0)]
Decay = Annotated[float, Range(at_least=0, below=1)]
Sigma = Annotated[float, Range(above=0, at_most=1)]
Pixels = Annotated[int, Range(at_least=16, multiple=16)]
Frames = Annotated[int, Range(at_least=33)]
Draw = Literal["sample", "micro_batch"]
Weights = Literal["auto", "ema", "last"]

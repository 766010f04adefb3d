"""The comparisons of tests/kernels/test_ops.py on a CUDA device, with the kernels compiled."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

spec = importlib.util.spec_from_file_location("ops_on_cuda", Path(__file__).parents[1] / "kernels" / "test_ops.py")
ops: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
spec.loader.exec_module(ops)  # type: ignore[union-attr]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
globals().update({name: value for name, value in vars(ops).items() if name.startswith("test_")})

# As many tokens as make every program walk over several, in each dtype, history first, none, and all.
LONG = [
    ops.Case(2, 2000, 5120, 700, torch.bfloat16, "dense"),
    ops.Case(1, 1501, 1000, 0, torch.float16, "strided"),
    ops.Case(3, 999, 96, 999, torch.float32, "turned"),
]


@pytest.fixture(params=["triton", "reference", "compile"])
def kernels(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("name", ops.OPS)
def test_many_tokens(name: str, case: Any, device: str) -> None:
    ops.compare(ops.OPS[name], case, "triton", device)

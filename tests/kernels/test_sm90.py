"""Every kernel compiles for sm_90 at 14b's widths in bf16, and no register spills: what ptxas says (shown by pytest -s)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = {
    (op, kernel)
    for op in ("modulated_norm", "gated_residual", "qk_norm_rope", "gelu")
    for kernel in ("forward_kernel", "backward_kernel")
}


def test_no_spills() -> None:
    script = Path(__file__).with_name("sm90.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for row in found:
        flags = " ".join(name for name, on in row["flags"].items() if on)
        print(
            f"{row['op']}.{row['kernel']:16} registers {row['registers']:3}  "
            f"spilled {row['spill_stores']}/{row['spill_loads']} B  warps {row['warps']:2}  shared {row['shared']:6} B  {flags}"
        )
    assert {(row["op"], row["kernel"]) for row in found} == KERNELS
    assert not [row for row in found if row["spill_stores"] or row["spill_loads"] or row["stack"]]
    # Rows are fetched ahead of their use: the loops are pipelined (an elementwise op has none).
    assert all(row["async_copies"] for row in found if row["op"] != "gelu")

"""Run every ```sh block of a README as it stands, in the working directory: python .ci/readme.py README.md

With DEMO=quick in the environment, training and sampling commands get a few more overrides that make them short; nothing else
is changed. `make test` is left out: it has a step of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

TRAIN = "trainer.max_steps=8 optimizer.warmup=2 watch.every=4 watch.sample_steps=3"
TOY = "data.toy.clips=16 data.held_out=4"
SAMPLE = "sample.steps=3"
CHAIN = """'chain.sample="sample.count=1 sample.steps=3"'"""
PAIRS = "pairs.count=2 pairs.sections=1 pairs.steps=3"
OWN_STEP = "make test"


def shortened(line: str) -> str:
    """The line with the overrides that its command understands."""
    if not line.startswith("python -m helios_train") or "--" in line or "experiment=debug" in line:
        return line
    if "experiment=toy_chain" in line:
        return " ".join([line, TRAIN, TOY, CHAIN])
    if "task=pairs" in line:
        return " ".join([line, TOY, PAIRS])
    if "task=" not in line:
        return " ".join([line, TRAIN, *([TOY] if "data=folder" not in line else [])])
    return f"{line} {SAMPLE}" if "task=sample" in line else line


def main() -> int:
    """Run the blocks in order; 1 at the first that fails."""
    blocks = re.findall(r"^```sh\n(.*?)^```", Path(sys.argv[1]).read_text(), flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        lines = [line for line in block.splitlines() if line.strip() != OWN_STEP]
        script = "\n".join(map(shortened, lines) if os.environ.get("DEMO") == "quick" else lines)
        print(script, flush=True)
        start = time.monotonic()
        if subprocess.run(["bash", "-euo", "pipefail", "-c", script]).returncode:
            print("FAILED: the block above")
            return 1
        print(f"({time.monotonic() - start:.0f} s)\n", flush=True)
    return 0 if blocks else 1


if __name__ == "__main__":
    sys.exit(main())

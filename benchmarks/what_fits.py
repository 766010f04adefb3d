"""What fits my GPU? Plans of 14 B, 384x640 pixels, one GPU, by the planner; the README's table.

Rows of stage=distill plan a student's turn after the adversary's start, batch 1, rank 256, published heads, the rollout with
most graphs. Writes results/what_fits.json, row by row; a row that is there is planned again only with --again. Prints the table.

Usage: python benchmarks/what_fits.py [--again] [--rows h100_80gb ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from helios_train.conf.compose import compose
from helios_train.tasks import plan

RESULT = Path(__file__).parent / "results" / "what_fits.json"
REAL = ["codec=wan", "text=umt5", "data=folder", "data.root=/nowhere", "data.size=[384,640]"]
CAST = ["stage=distill", "model=14b", *REAL, "data.global_batch=1", "data.micro_batch=1"]
SINGLE = ["codec.weights=/nowhere", "init=/nowhere", "data.root=/nowhere", "memory=single", "optimizer=adamw8bit"]
ROWS = {
    name: ("distill", 1, [*CAST, f"memory={name}"]) for name in ("h100_80gb", "shared_48gb", "nf4_24gb", "nf4_16gb", "stream")
}
for stage in ("base", "mid"):
    for batch in (2, 8):
        size = [f"data.global_batch={batch}", f"data.micro_batch={batch}"]
        ROWS[f"single, {stage} x {batch}"] = (stage, batch, [f"experiment={stage}_init", *SINGLE, *size])
GROUPS = ("weights", "lineage", "trainable", "masters", "optimizer", "gradients", "activations")  # what a sum is taken over


def planned(words: list[str]) -> dict[str, Any]:
    """The plan of a row, by kind of group."""
    found = plan.plan_of(compose(["task=plan", *words]))
    record = found.record()
    kinds = {kind: sum(size for group, size in record["by_group"].items() if group.startswith(kind)) for kind in GROUPS}
    keys = ("peak_gib", "moment", "reserved_gib", "host_gib", "fits")
    return {key: record[key] for key in keys} | {"by_kind": kinds}


def table(rows: dict[str, Any]) -> str:
    """As README has it."""
    lines = [
        "| `memory=` | trains | batch | peak, GiB | taken with context and fragmentation | on the host | fits |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        stage, batch, _ = ROWS[name]
        smallest = next((card for card, fits in row["fits"].items() if fits), "none")
        figures = f"{row['peak_gib']:.1f} | {row['reserved_gib']:.1f} | {row['host_gib']:.0f}"
        lines.append(f"| `{name.partition(',')[0]}` | `{stage}` | {batch} | {figures} | {smallest} and up |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    given = parser.parse_args()
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name in given.rows:
        if given.again or name not in known:
            known[name] = planned(ROWS[name][2])
            known = {row: known[row] for row in ROWS if row in known}
            RESULT.write_text(json.dumps(known, indent=1) + "\n")
            print(name, json.dumps(known[name]), flush=True)
    print(table(known))


if __name__ == "__main__":
    main()

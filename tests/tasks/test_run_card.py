"""The run card's account of the data: what it was made with, and what is amiss with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from helios_train.data.format import Bucket, Manifest
from helios_train.models.codecs import dct_codec
from helios_train.models.text import HashText
from helios_train.tasks.run_card import warnings


def stored(*clips: tuple[int, int], **health: object) -> Manifest:
    """A dataset of (sections, clips)."""
    buckets = tuple(Bucket(33 * sections, 64, 64, n) for sections, n in clips)
    manifest = Manifest(buckets, (), {}, {}, "", health=health)
    vars(manifest)["total"] = sum(n for _, n in clips)  # it counts shards, and here are none
    return manifest


def test_healthy_data_are_passed_over() -> None:
    fine = {"short_history": 0, "caption_missing": 0, "caption_empty": 0, "skipped": {}}
    assert warnings(stored((4, 8), (5, 2), **fine), 10, 10) == [] == warnings(stored((4, 8)), 8, 8)


@pytest.mark.parametrize(
    ("manifest", "clips", "said"),
    [
        (stored((3, 1), (4, 3)), 8, "1 of 4 clips (25%) have under 4 sections: they never show a full history"),
        (stored((1, 2), (3, 1)), 8, "3 of 3 clips (100%) have under 4 sections: they never show a full history"),
        (stored((4, 8), caption_missing=3, caption_empty=1), 8, "4 of 8 clips (50%) have no caption: they train the null text"),
        (stored((4, 8)), 7, "7 clips are fewer than the global batch of 8: each iteration repeats some of them"),
        (
            stored((4, 8), skipped={"short": 2, "unreadable": 1}),
            8,
            "3 videos were left out of the dataset (2 short, 1 unreadable): its skipped.json names them",
        ),
    ],
)
def test_each_fault_has_its_line(manifest: Manifest, clips: int, said: str) -> None:
    assert warnings(manifest, clips, 8) == [said]


def test_the_card_of_a_run(tiny_run: Callable[..., None], tmp_path: Path) -> None:
    """The debug clips have two sections; six are left to train on after the two held out."""
    tiny_run(f"run_dir={tmp_path}/run", "trainer.max_steps=1", "data.global_batch=8", "data.micro_batch=1")
    card = (tmp_path / "run" / "run_card.txt").read_text()
    codec, text = dct_codec().fingerprint()[:12], HashText().fingerprint()[:12]
    assert f"made with codec dct {codec}, text hash {text} (16 rows of 64)\n" in card
    assert "\nglobal batch 8 = micro batch 1 x 1 devices x 8 accumulated\n" in card
    (block,) = re.findall(r"\n\nWARNINGS: 2\n((?:  ! .*\n)+)", card)
    assert block.splitlines() == [
        "  ! 8 of 8 clips (100%) have under 4 sections: they never show a full history",
        "  ! 6 clips are fewer than the global batch of 8: each iteration repeats some of them",
    ]


def test_the_card_of_a_mid_run_counts_its_levels(tiny_run: Callable[..., None], tmp_path: Path) -> None:
    tiny_run(f"run_dir={tmp_path}/base", "trainer.max_steps=1")
    tiny_run("stage=mid", f"init={tmp_path}/base", f"run_dir={tmp_path}/run", "trainer.max_steps=1")
    card = (tmp_path / "run" / "run_card.txt").read_text()
    assert "\nglobal batch 2 = micro batch 1 x 1 devices x 2 accumulated (x 3 levels, 4 passes)\n" in card

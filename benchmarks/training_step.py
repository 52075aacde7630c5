"""A training step of ours, against upstream's loop and against a bare loop of the networks.

    python benchmarks/training_step.py --batch_size 1
    python benchmarks/training_step.py --batch_size 1 --compile
    python benchmarks/training_step.py --size sd15 --precision bf16 --image_size 4000
    python benchmarks/training_step.py --size sdxl --precision bf16 --rounds 2 --steps 10

upstream: the loop of the Diffusers example in plain code, tests/upstream.py. At every step it reads and
resizes the images, sends the pixels through the VAE, runs AdamW on the whole embedding matrix and restores
the old rows. bare: text encoder and U-Net forward and backward on prepared tensors, and nothing else. ours:
the training script. On a GPU it also measures the memory of upstream and ours at their peak.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from models import DEVICE, DTYPES, model_folder
from PIL import Image
from timing import added_memory, alternate, medians, ratio, report, seconds, synchronize

import textual_inversion_szt
from szt_utils.arguments import command_line, script_parser
from szt_utils.embeddings import add_placeholder, train_rows
from szt_utils.models import load_model, tokenize
from szt_utils.pocket import write_concept
from szt_utils.training_run import Run

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from upstream import upstream as upstream_loop
from upstream import upstream_sdxl

WARMUP = 3  # steps of every training that are not timed


@dataclass(frozen=True)
class Settings:
    """A training to measure; each field is a flag."""

    size: str = "pocket"  # of the model
    batch_size: int = 1
    steps: int = 20  # of a round
    rounds: int = 7
    precision: str = "no"
    compile: bool = False
    image_size: int = 128  # side of the images on disk

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--size", choices=["pocket", "sd15", "sdxl"], default="pocket", help="of the model")
        add("--batch_size", type=int, default=1)
        add("--steps", type=int, default=20, help="steps of a round")
        add("--rounds", type=int, default=7)
        add("--precision", choices=DTYPES, default="no")
        add("--compile", action="store_true")
        add("--image_size", type=int, default=128, help="side of the images on disk")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Settings":
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    @property
    def all_steps(self) -> int:
        """Steps of a training, warmup included."""
        return self.steps + WARMUP


class StepClock:
    """Measures the seconds per step of a training; call it after every step."""

    def __init__(self, settings: Settings):
        self.steps, self.count, self.times = settings.steps, 0, []

    def __call__(self, *_: object) -> None:
        self.count += 1
        if self.count in (WARMUP, WARMUP + self.steps):
            synchronize()
            self.times.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        start, end = self.times
        return (end - start) / self.steps


def upstream(settings: Settings, folder: Path) -> float:
    """Seconds per step of upstream's loop on a folder of images."""
    path, resolution = model_folder(settings.size)
    clock = StepClock(settings)
    loop = upstream_sdxl if settings.size == "sdxl" else upstream_loop
    loop(path, folder, token="<new>", initializer="object", batch_size=settings.batch_size,
         steps=settings.all_steps, repeats=100, lr=1e-4, resolution=resolution,
         mixed_precision=settings.precision, on_step=clock)
    return clock.seconds_per_step


def ours(settings: Settings, folder: Path, **flags: object) -> float:
    """Seconds per step of the training script on a folder of images, with more `flags`."""
    path, resolution = model_folder(settings.size)
    clock, original = StepClock(settings), Run.step

    def step(self, *args):
        original(self, *args)
        clock()

    AcceleratorState._reset_state(True)  # a process has one; every training is a run of its own
    with tempfile.TemporaryDirectory() as output_dir, mock.patch.object(Run, "step", step):
        textual_inversion_szt.main(command_line(**{
            "pretrained_model_name_or_path": path, "train_data_dir": folder, "output_dir": output_dir,
            "placeholder_token": "<new>", "initializer_token": "object", "resolution": resolution,
            "train_batch_size": settings.batch_size, "max_train_steps": settings.all_steps,
            "mixed_precision": settings.precision, "compile": settings.compile, **flags}))
    return clock.seconds_per_step


class Bare:
    """The networks alone: what no training of an embedding can leave out."""

    def __init__(self, settings: Settings):
        path, resolution = model_folder(settings.size)
        self.model, self.steps = load_model(path, dtype=DTYPES[settings.precision], device=DEVICE,
                                            text_dtype=torch.float32), settings.steps
        for tokenizer, encoder in zip(self.model.tokenizers, self.model.text_encoders, strict=True):
            add_placeholder(tokenizer, encoder, "<new>", "object")
            train_rows(encoder, 1)
            encoder.to(DEVICE).train()
            if settings.compile:
                encoder.compile()
        if settings.compile:
            self.model.network.compile()
        size, side = settings.batch_size, resolution // self.model.vae_scale_factor
        self.noise = torch.randn(size, 4, side, side, device=DEVICE, dtype=self.model.dtype)
        self.timesteps = torch.randint(0, 1000, (size,), device=DEVICE)
        self.ids = [ids.to(DEVICE) for ids in tokenize(self.model, ["a photo of a <new>"] * size)]

    def run(self) -> float:
        return seconds(self.step, self.steps)

    def step(self) -> None:
        dtype = self.model.dtype
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            condition = self.model.condition(self.ids)
        prediction = self.model.predict(self.noise, self.timesteps, condition)
        (prediction.float() - self.noise.float()).square().mean().backward()


def write_images(settings: Settings, folder: Path) -> Path:
    """Write five images of the pocket world, enlarged to `image_size`; returns their folder."""
    for path in write_concept("teal-striped-star", folder / "images"):
        Image.open(path).resize((settings.image_size,) * 2).save(path)
    return folder / "images"


def main() -> None:
    parser = script_parser(__doc__)
    Settings.add_flags(parser)
    settings = Settings.of(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        images, peaks = write_images(settings, Path(folder)), {}

        def timed(train: Callable[[Settings, Path], float]) -> float:
            if not torch.cuda.is_available():
                return train(settings, images)
            result = []
            peaks[train.__name__] = added_memory(lambda: result.append(train(settings, images)))
            return result[0]

        sides = {"upstream": lambda: timed(upstream), "ours": lambda: timed(ours), "bare": Bare(settings).run}
        if settings.compile:
            sides["bare eager"] = Bare(replace(settings, compile=False)).run
        durations = alternate(sides, settings.rounds)
    ratios = {"upstream / ours": ratio(durations, "upstream", "ours"),
              "ours / bare": ratio(durations, "ours", "bare")}
    if settings.compile:
        ratios["bare eager / ours"] = ratio(durations, "bare eager", "ours")
    content = {"options": asdict(settings), "seconds per step": medians(durations), "ratios": ratios}
    if peaks:
        content["bytes at the peak"] = peaks
    name = "_".join(["training_step", settings.size, f"batch{settings.batch_size}", settings.precision,
                     *(["compiled"] if settings.compile else []),
                     *([f"{settings.image_size}px"] if settings.image_size != 128 else [])])
    report(name, content)


if __name__ == "__main__":
    main()

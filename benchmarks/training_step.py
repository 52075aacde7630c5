"""A training step of ours against upstream's algorithm and against a bare loop of the networks.

    python benchmarks/training_step.py --batch_size 1
    python benchmarks/training_step.py --batch_size 1 --compile
    python benchmarks/training_step.py --size sd15 --precision bf16 --picture_size 4000

upstream: the picture read and resized at every step, pixels through the VAE, AdamW on the whole embedding
matrix and its old rows put back, the loss read at every step. bare: the text encoder and the U-Net forward
and backward on tensors that lie ready, and nothing else. ours: the real script.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from models import DEVICE, DTYPES, model_folder
from PIL import Image
from timing import alternate, medians, ratio, report, seconds, synchronize

import textual_inversion_szt
from szt_utils.captions import OBJECT_TEMPLATES
from szt_utils.diffusion import LatentDiffusion
from szt_utils.embeddings import add_placeholder, train_rows
from szt_utils.pocket import write_concept


def load(options, whole: bool) -> LatentDiffusion:
    """The model with a row for a new token; the text encoder stays float32, as upstream keeps it."""
    from transformers import CLIPTextModel

    path, _ = model_folder(options.size)
    model = LatentDiffusion.load(path, dtype=DTYPES[options.precision], device=DEVICE)
    model.text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder")
    add_placeholder(model.tokenizer, model.text_encoder, "<new>", "object")
    if whole:
        model.text_encoder.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    else:
        train_rows(model.text_encoder, 1)
    model.text_encoder.to(DEVICE).train()
    return model


class Upstream:
    """Upstream's algorithm, told plainly."""

    def __init__(self, options, folder: Path):
        self.model, self.options = load(options, whole=True), options
        self.resolution = model_folder(options.size)[1]
        self.paths = sorted(folder.iterdir())
        self.weight = self.model.text_encoder.get_input_embeddings().weight
        self.original = self.weight.data.clone()
        self.optimizer = torch.optim.AdamW([self.weight], lr=1e-4, weight_decay=1e-2)

    def __len__(self) -> int:
        return 100 * len(self.paths)

    def __getitem__(self, i: int) -> dict:
        image = Image.open(self.paths[i % len(self.paths)]).convert("RGB")
        image = image.resize((self.resolution,) * 2, Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.array(image).astype(np.uint8) / 127.5 - 1).astype(np.float32)
        ids = self.model.tokenizer(random.choice(OBJECT_TEMPLATES).format("<new>"), padding="max_length",
                                   truncation=True, return_tensors="pt").input_ids[0]
        return {"pixels": torch.from_numpy(pixels).permute(2, 0, 1), "ids": ids}

    def run(self) -> float:
        loader = iter(torch.utils.data.DataLoader(self, batch_size=self.options.batch_size, shuffle=True))
        return seconds(lambda: self.step(next(loader)), self.options.steps)

    def step(self, batch: dict) -> None:
        model, dtype = self.model, self.model.dtype
        latents = model.vae.encode(batch["pixels"].to(DEVICE, dtype)).latent_dist.sample().detach()
        latents = latents * model.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=DEVICE)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            states = model.text_encoder(batch["ids"].to(DEVICE))[0].float().to(dtype)
        noised = model.scheduler.add_noise(latents, noise, timesteps)
        prediction = model.unet(noised, timesteps, states).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            old = torch.ones(len(self.weight), dtype=torch.bool)
            old[-1] = False
            self.weight[old] = self.original[old]
        loss.item()


class Bare:
    """The networks alone: what no training of the embedding can do without."""

    def __init__(self, options):
        self.model, self.options = load(options, whole=False), options
        if options.compile:
            self.model.unet.compile()
            self.model.text_encoder.compile()
        side = model_folder(options.size)[1] // 8
        size, dtype = options.batch_size, self.model.dtype
        self.noise = torch.randn(size, 4, side, side, device=DEVICE, dtype=dtype)
        self.timesteps = torch.randint(0, 1000, (size,), device=DEVICE)
        self.ids = self.model.tokenizer(["a photo of a <new>"] * size, padding="max_length",
                                        return_tensors="pt").input_ids.to(DEVICE)

    def run(self) -> float:
        return seconds(self.step, self.options.steps)

    def step(self) -> None:
        dtype = self.model.dtype
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            states = self.model.text_encoder(self.ids)[0].float().to(dtype)
        prediction = self.model.unet(self.noise, self.timesteps, states).sample
        (prediction.float() - self.noise.float()).square().mean().backward()


def ours(options, folder: Path, *more: str) -> float:
    """Seconds per step of the real script, between its third step and its last."""
    path, resolution = model_folder(options.size)
    stamps, draw = {}, textual_inversion_szt.Concept.draw

    def stamped(self, *arguments):
        if self.step not in stamps:  # the first of the concepts that share the step
            if self.step in (2, 2 + options.steps):
                synchronize()
            stamps[self.step] = time.perf_counter()
        return draw(self, *arguments)

    textual_inversion_szt.Concept.draw = stamped
    try:
        with tempfile.TemporaryDirectory() as output:
            textual_inversion_szt.main([
                "--pretrained_model_name_or_path", path, "--train_data_dir", str(folder),
                "--output_dir", output, "--placeholder_token", "<new>", "--initializer_token", "object",
                "--resolution", str(resolution), "--train_batch_size", str(options.batch_size),
                "--max_train_steps", str(options.steps + 3), "--mixed_precision", options.precision,
                *(["--compile"] if options.compile else []), *more])
    finally:
        textual_inversion_szt.Concept.draw = draw
    return (stamps[2 + options.steps] - stamps[2]) / options.steps


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--picture_size", type=int, default=128, help="side of the pictures on disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_concept("teal-striped-star", Path(folder) / "pictures", Path(folder) / "masks")
        pictures = Path(folder) / "pictures"
        for picture in pictures.iterdir():
            Image.open(picture).resize((options.picture_size,) * 2).save(picture)
        upstream, bare = Upstream(options, pictures), Bare(options)
        sides = {"upstream": upstream.run, "ours": lambda: ours(options, pictures), "bare": bare.run}
        if options.compile:
            sides["bare eager"] = Bare(argparse.Namespace(**{**vars(options), "compile": False})).run
        durations = alternate(sides, options.rounds)
    name = "_".join(["training_step", options.size, f"batch{options.batch_size}", options.precision,
                     *(["compiled"] if options.compile else []),
                     *([f"{options.picture_size}px"] if options.picture_size != 128 else [])])
    ratios = {"upstream / ours": ratio(durations, "upstream", "ours"),
              "ours / bare": ratio(durations, "ours", "bare")}
    if options.compile:
        ratios["bare eager / ours"] = ratio(durations, "bare eager", "ours")
    report(name, {"options": vars(options), "seconds per step": medians(durations), "ratios": ratios})


if __name__ == "__main__":
    main()

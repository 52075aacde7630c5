"""Scripts of our own with the idioms of Diffusers' examples, patched and run; and the real ones, if given."""

import argparse
import ast
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_flux, build_tiny_sd3, build_tiny_sdxl
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from szt_utils import patched
from szt_utils.errors import InputError
from szt_utils.images import read_image
from szt_utils.masks import to_latent_grid
from szt_utils.notices import notice
from szt_utils.patch import main, patch_script
from szt_utils.safe_zone import SafeZone

HEAD = """
import argparse
import contextlib
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms

drawn, gradients, results = [], [], []


class accelerator:
    accumulate = staticmethod(lambda model: contextlib.nullcontext())


def parse_args(input_args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_data_dir")
    parser.add_argument("--class_data_dir")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--with_prior_preservation", action="store_true")
    parser.add_argument("--cache_latents", action="store_true")
    parser.add_argument("--snr_gamma", type=float)
    if input_args is not None:
        args = parser.parse_args(input_args)
    else:
        args = parser.parse_args()
    return args


def encode(pixel_values):
    return F.avg_pool2d(pixel_values, 4)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, 3, 8, 8))

    def forward(self, noisy):
        return noisy * self.scale
"""

LOOP = """
    unet = Model()
    optimizer = torch.optim.SGD(unet.parameters(), 1.0)
    torch.manual_seed(args.resolution)
    for epoch in range(2):
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(unet):
"""

TAIL = """
                loss.backward()
                drawn.extend(timesteps.tolist())
                gradients.append(unet.scale.grad.clone())
                results.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
"""

# Images opened one by one, a whole number drawn for the timestep, a plain squared error.
PLAIN = HEAD + """

class Textual(Dataset):
    def __init__(self, data_root, size, flip_p=0.5):
        self.size, self.flip = size, transforms.RandomHorizontalFlip(p=flip_p)
        self.image_paths = sorted(Path(data_root).iterdir())
        random.shuffle(self.image_paths)

    def __len__(self):
        return len(self.image_paths)

    def __getitem__(self, i):
        example = {}
        image = Image.open(self.image_paths[i])
        if not image.mode == "RGB":
            image = image.convert("RGB")
        example["word"] = random.randrange(100)
        image = image.resize((self.size, self.size), resample=Image.BICUBIC)
        image = self.flip(image)
        image = (np.array(image).astype(np.uint8) / 127.5 - 1.0).astype(np.float32)
        example["pixel_values"] = torch.from_numpy(image).permute(2, 0, 1)
        return example


def main(input_args=None):
    args = parse_args(input_args)
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    random.seed(0)
    torch.manual_seed(0)
    train_dataset = Textual(data_root=args.train_data_dir, size=args.resolution)
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset, batch_size=2, shuffle=True
    )
""" + LOOP + """
                latents = encode(batch["pixel_values"])
                noise = torch.randn_like(latents)
                bsz = latents.shape[0]
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (bsz,), device="cpu")
                timesteps = timesteps.long()
                model_pred = unet(noise_scheduler.add_noise(latents, noise, timesteps))
                target = noise
                loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
""" + TAIL

# Images of a column of `datasets`, cropped at random; min-SNR.
COLUMNS = HEAD + """

def main(input_args=None):
    from datasets import load_dataset
    args = parse_args(input_args)
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    dataset = load_dataset("imagefolder", data_dir=args.train_data_dir)
    image_column = "image"
    train_transforms = transforms.Compose([transforms.Resize(48), transforms.RandomCrop(args.resolution),
                                           transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                           transforms.Normalize([0.5], [0.5])])
    torch.manual_seed(0)

    def preprocess_train(examples):
        images = [image.convert("RGB") for image in examples[image_column]]
        examples["pixel_values"] = [train_transforms(image) for image in images]
        return examples

    train_dataset = dataset["train"].with_transform(preprocess_train)

    def collate_fn(examples):
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}

    train_dataloader = torch.utils.data.DataLoader(
        train_dataset, shuffle=True, collate_fn=collate_fn, batch_size=2
    )
""" + LOOP + """
                model_input = encode(batch["pixel_values"])
                noise = torch.randn_like(model_input)
                bsz = model_input.shape[0]
                timesteps = torch.randint(
                    0, noise_scheduler.config.num_train_timesteps, (bsz,), device=model_input.device
                )
                timesteps = timesteps.long()
                model_pred = unet(noise_scheduler.add_noise(model_input, noise, timesteps))
                target = noise
                if args.snr_gamma is None:
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                else:
                    snr = compute_snr(noise_scheduler, timesteps)
                    weights = torch.stack([snr, args.snr_gamma * torch.ones_like(timesteps)], dim=1)
                    weights = weights.min(dim=1)[0] / snr
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
                    loss = loss.mean(dim=list(range(1, len(loss.shape)))) * weights
                    loss = loss.mean()
""" + TAIL

# Images prepared once, class images, latents cached by step, a density of timesteps, a weighted error.
FLOW = HEAD + """

class DreamBoothDataset(Dataset):
    def __init__(self, instance_data_root, class_data_root=None, size=32):
        instance_images = [Image.open(path) for path in list(Path(instance_data_root).iterdir())]
        self.instance_images = []
        for img in instance_images:
            self.instance_images.append(img)
        crop, flip = transforms.RandomCrop(size), transforms.RandomHorizontalFlip(p=1.0)
        self.to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
        self.pixel_values = []
        for image in self.instance_images:
            image = transforms.functional.resize(image.convert("RGB"), 48)
            if random.random() < 0.5:
                image = flip(image)
            self.pixel_values.append(self.to_tensor(crop(image)))
        self.class_paths = sorted(Path(class_data_root).iterdir()) if class_data_root else None
        self.size = size

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        example = {"instance_images": self.pixel_values[index]}
        if self.class_paths:
            class_image = Image.open(self.class_paths[index % len(self.class_paths)])
            class_image = class_image.convert("RGB").resize((self.size, self.size))
            example["class_images"] = self.to_tensor(class_image)
        return example


def collate_fn(examples, with_prior_preservation=False):
    pixel_values = [example["instance_images"] for example in examples]
    if with_prior_preservation:
        pixel_values += [example["class_images"] for example in examples]
    return {"pixel_values": torch.stack(pixel_values)}


def main(input_args=None):
    args = parse_args(input_args)
    noise_scheduler_copy = FlowMatchEulerDiscreteScheduler(shift=3.0)
    random.seed(0)
    torch.manual_seed(0)
    train_dataset = DreamBoothDataset(
        instance_data_root=args.train_data_dir,
        class_data_root=args.class_data_dir if args.with_prior_preservation else None,
        size=args.resolution,
    )
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=1,
        shuffle=True,
        collate_fn=lambda examples: collate_fn(examples, args.with_prior_preservation),
    )
    if args.cache_latents:
        latents_cache = []
        for batch in train_dataloader:
            with torch.no_grad():
                latents_cache.append(encode(batch["pixel_values"]))

    def get_sigmas(timesteps):
        places = [(noise_scheduler_copy.timesteps == t).nonzero().item() for t in timesteps]
        return noise_scheduler_copy.sigmas[places].view(-1, 1, 1, 1)
""" + LOOP + """
                if args.cache_latents:
                    model_input = latents_cache[step]
                else:
                    model_input = encode(batch["pixel_values"])
                noise = torch.randn_like(model_input)
                bsz = model_input.shape[0]
                u = compute_density_for_timestep_sampling(
                    weighting_scheme="logit_normal",
                    batch_size=bsz,
                    logit_mean=0.0,
                    logit_std=1.0,
                )
                indices = (u * noise_scheduler_copy.config.num_train_timesteps).long()
                timesteps = noise_scheduler_copy.timesteps[indices].to(device=model_input.device)
                sigmas = get_sigmas(timesteps)
                noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
                model_pred = unet(noisy_model_input)
                weighting = torch.ones_like(sigmas)
                target = noise - model_input
                if args.with_prior_preservation:
                    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
                    target, target_prior = torch.chunk(target, 2, dim=0)
                    weighting, weighting_prior = torch.chunk(weighting, 2, dim=0)
                    prior_loss = torch.mean(
                        (
                            weighting_prior.float() * (model_pred_prior.float() - target_prior.float()) ** 2
                        ).reshape(target_prior.shape[0], -1),
                        1,
                    ).mean()
                loss = torch.mean(
                    (weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(
                        target.shape[0], -1
                    ),
                    1,
                )
                loss = loss.mean()
                if args.with_prior_preservation:
                    loss = loss + 0.5 * prior_loss
""" + TAIL

SCRIPTS = {"plain": PLAIN, "columns": COLUMNS, "flow": FLOW}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images of 72 x 64 pixels of a bright square that is white in their masks, and class images."""
    root, rng = tmp_path_factory.mktemp("patch"), np.random.default_rng(0)
    for name in ("images", "masks", "class"):
        (root / name).mkdir()
    for i in range(4):
        image, mask = rng.integers(0, 90, (64, 72, 3), np.uint8), np.zeros((64, 72), np.uint8)
        mask[20:44, 26 + 2 * i:44 + 2 * i] = 255
        image[mask > 0] = 250
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(root / "class" / f"{i}.png")
    return root


def run(source, *flags):
    """Run a miniature; what it left in its lists."""
    names = {"__name__": "miniature"}
    exec(compile(source, "miniature", "exec"), names)
    names["main"]([str(flag) for flag in flags])
    return names


def flags_of(name, folders, prior=False):
    more = ["--with_prior_preservation", "--class_data_dir", folders / "class"] if prior else []
    return ["--train_data_dir", folders / "images", *more]


@pytest.mark.parametrize("name, more", [
    ("plain", []), ("columns", []), ("columns", ["--snr_gamma", "5"]), ("flow", []),
    ("flow", ["--cache_latents"]), ("flow", ["prior"])])
def test_with_the_flags_off_the_result_is_the_originals_bit_for_bit(name, more, folders):
    flags = flags_of(name, folders, "prior" in more) + [flag for flag in more if flag != "prior"]
    original, changed = run(SCRIPTS[name], *flags), run(patch_script(SCRIPTS[name]), *flags)
    assert original["drawn"] == changed["drawn"] and original["results"] == changed["results"]
    assert len(original["results"]) >= 4
    for one, other in zip(original["gradients"], changed["gradients"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name, more", [
    ("plain", []), ("columns", []), ("columns", ["--snr_gamma", "5"]), ("flow", []),
    ("flow", ["--cache_latents"])])
def test_with_the_flags_on_training_is_in_the_safe_zone_only(name, more, folders, monkeypatch, capsys):
    """No timestep below the threshold, and no gradient outside the masks, which lie on the bright square."""
    flags = [*flags_of(name, folders), *more, "--szt", "--loss_mask_dir", folders / "masks"]
    seen = []
    real = patched.SafeZoneTraining.mask

    def mask(self, prediction, target, batch, step=0):
        seen.append(((self._cached[step] if self._cached else batch["szt_mask"]), batch["pixel_values"]))
        return real(self, prediction, target, batch, step)
    monkeypatch.setattr(patched.SafeZoneTraining, "mask", mask)
    done = run(patch_script(SCRIPTS[name]), *flags)
    assert min(done["drawn"]) >= (618 if name == "flow" else 500) and len(set(done["drawn"])) > 3
    for gradient, (masks, pixels) in zip(done["gradients"], seen, strict=True):
        cells = to_latent_grid(masks, (8, 8)).amax(0)
        assert 0 < cells.sum() < 40
        assert not gradient[0][:, cells[0] == 0].any() and gradient[0][:, cells[0] == 1].any()
        if not more or "--cache_latents" not in more:
            bright = (pixels.mean(1, keepdim=True) > 0.3).float()
            assert (bright > masks).float().mean() < 0.02  # the mask has gone the image's way, and is grown
            assert masks.mean() < 3 * bright.mean()
    text = capsys.readouterr().out
    assert "Safe-Zone Training: JPEG quality 25" in text and "4 masks" in text


def test_latents_that_are_cached_by_step_keep_their_masks(folders, monkeypatch):
    """The loader shuffles anew in every epoch, while the cached latents keep the order of the caching."""
    pairs = []
    real = patched.SafeZoneTraining.remember

    def remember(self, batch):
        real(self, batch)
        pairs.append((batch["pixel_values"], self._cached[-1]))
    monkeypatch.setattr(patched.SafeZoneTraining, "remember", remember)
    flags = [*flags_of("flow", folders), "--cache_latents", "--loss_mask_dir", folders / "masks"]
    done = run(patch_script(FLOW), *flags)
    assert len(pairs) == 4 and len({masks.numpy().tobytes() for _, masks in pairs}) > 1
    for step, (pixels, masks) in enumerate(pairs):
        assert ((pixels.mean(1, keepdim=True) > 0.3).float() != masks).float().mean() < 0.06
        for gradient in (done["gradients"][step], done["gradients"][step + 4]):  # both epochs
            assert not gradient[0][:, to_latent_grid(masks, (8, 8))[0, 0] == 0].any()


def test_class_images_get_all_timesteps_no_mask_and_no_jpeg(folders, monkeypatch):
    flags = [*flags_of("flow", folders, prior=True), "--szt", "--loss_mask_dir", folders / "masks"]
    batches = []
    monkeypatch.setattr(patched.SafeZoneTraining, "mask", spy(patched.SafeZoneTraining.mask, batches))
    halves = [[], []]
    for resolution in (32, 28, 36):  # also the seed
        side = resolution // 4
        script = patch_script(FLOW.replace("ones(1, 3, 8, 8)", f"ones(1, 3, {side}, {side})"))
        done = run(script, *flags, "--resolution", resolution)
        halves[0] += done["drawn"][::2]
        halves[1] += done["drawn"][1::2]
    assert min(halves[0]) >= 618 > min(halves[1])
    pixels = batches[0]["pixel_values"]
    classes = {read_image(path).resize((32, 32)).tobytes() for path in (folders / "class").iterdir()}
    levels = ((pixels[1] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert len(pixels) == 2 and levels.tobytes() in classes
    assert batches[0]["szt_mask"].shape == (1, 1, 32, 32)
    assert all(gradient.ne(0).all() for gradient in done["gradients"])  # the class images count everywhere


def spy(real, batches):
    def mask(self, prediction, target, batch, step=0):
        batches.append(batch)
        return real(self, prediction, target, batch, step)
    return mask


def test_images_and_masks_are_those_of_the_training_script(folders, monkeypatch):
    """Without crops and flips, an example is what SafeZone.open gives."""
    batches = []
    monkeypatch.setattr(patched.SafeZoneTraining, "mask", spy(patched.SafeZoneTraining.mask, batches))
    script = patch_script(PLAIN.replace("p=flip_p", "p=0.0"))
    run(script, *flags_of("plain", folders), "--szt", "--loss_mask_dir", folders / "masks")
    zone, expected = SafeZone.paper(32), {}
    for path in (folders / "images").iterdir():
        image, mask = zone.open(path, 32, folders / "masks")
        expected[np.asarray(image).tobytes()] = mask
    for batch in batches:
        for pixels, mask in zip(batch["pixel_values"], batch["szt_mask"], strict=True):
            levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            assert (expected[levels.tobytes()] != mask).float().mean() < 0.05  # its edge is bicubic


def test_each_flag_works_alone(folders, monkeypatch):
    patched_plain, batches = patch_script(PLAIN), []
    monkeypatch.setattr(patched.SafeZoneTraining, "mask", spy(patched.SafeZoneTraining.mask, batches))
    flags = flags_of("plain", folders)
    original = run(PLAIN, *flags)
    late = run(patched_plain, *flags, "--t_min", "900")
    assert min(late["drawn"]) >= 900 and all(gradient.ne(0).all() for gradient in late["gradients"])
    squeezed = run(patched_plain, *flags, "--jpeg_quality", "5")
    assert squeezed["drawn"] == original["drawn"] and squeezed["results"] != original["results"]
    masks = ["--loss_mask_dir", folders / "masks"]
    masked = run(patched_plain, *flags, *masks)
    first = len(batches)
    area = run(patched_plain, *flags, *masks, "--mask_normalization", "area")
    assert masked["drawn"] == area["drawn"] == original["drawn"]
    share = to_latent_grid(batches[first]["szt_mask"], (8, 8)).mean().item()
    assert masked["results"][0] < original["results"][0] and share < 1
    assert area["results"][0] == pytest.approx(masked["results"][0] / share)
    grey = run(patched_plain, *flags, *masks, "--mask_mode", "image")
    assert grey["drawn"] == original["drawn"]
    outside = batches[-1]["pixel_values"][batches[-1]["szt_mask"].expand(-1, 3, -1, -1) == 0]
    assert outside.abs().max() < 1e-6  # mid-grey


@pytest.mark.parametrize("more, message", [
    (["--mask_dilation", "3"], "--mask_dilation needs --loss_mask_dir"),
    (["--t_min", "1000"], "t_min is 1000"),
    (["--loss_mask_dir", "nowhere"], "'nowhere' does not exist"),
    (["--t_power", "5"], "--t_power needs --t_distribution power"),
    (["--t_distribution", "power", "--t_width", "5"], "--t_width needs --t_distribution tanh"),
    (["--loss_mask_dir", "nowhere", "--mask_mode", "latent"], "--mask_mode latent is not offered")])
def test_a_mistake_in_the_flags_ends_the_script_with_one_sentence(more, message, folders):
    with pytest.raises(SystemExit, match=message):
        run(patch_script(PLAIN), *flags_of("plain", folders), *more)


def test_an_image_without_a_mask_ends_the_script_before_it_trains(folders, tmp_path):
    (tmp_path / "masks").mkdir()
    for path in sorted((folders / "masks").iterdir())[1:]:
        (tmp_path / "masks" / path.name).write_bytes(path.read_bytes())
    for name, source in SCRIPTS.items():
        with pytest.raises(SystemExit, match="0.png' has no mask"):
            run(patch_script(source), *flags_of(name, folders), "--loss_mask_dir", tmp_path / "masks")


@pytest.mark.parametrize("name, orientation", [("plain", 6), ("columns", 6), ("columns", 1)])
def test_an_image_on_its_side_is_turned_upright_with_its_mask(name, orientation, folders, tmp_path):
    """`datasets` takes an image with any EXIF orientation, as cameras write it, for one without a file."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    image = Image.open(folders / "images" / "0.png")
    turned, exif = image.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else image, Image.Exif()
    exif[0x0112] = orientation  # 6: rotate by 270 degrees to see it
    turned.save(tmp_path / "images" / "0.png", exif=exif)
    upright = np.asarray(read_image(tmp_path / "images" / "0.png"))
    assert upright.shape == (64, 72, 3)
    white = np.where(upright.min(-1) > 200, 255, 0).astype(np.uint8)
    Image.fromarray(white).save(tmp_path / "masks" / "0.png")
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patched.SafeZoneTraining, "mask", spy(patched.SafeZoneTraining.mask, batches))
        run(patch_script(SCRIPTS[name]), *flags_of(name, tmp_path), "--loss_mask_dir", tmp_path / "masks")
    bright = batches[0]["pixel_values"].mean(1, keepdim=True) > 0.3
    assert (bright.float() != batches[0]["szt_mask"]).float().mean() < 0.06


def started(*flags, scheduler=None, **args):
    """The object of a patched script for these flags, and arguments of the script's own."""
    parser = argparse.ArgumentParser()
    patched.add_flags(parser)
    args = argparse.Namespace(**vars(parser.parse_args([*map(str, flags)])), resolution=32, **args)
    return patched.SafeZoneTraining(args, scheduler or DDPMScheduler())


def test_a_batch_whose_masks_are_empty_has_no_loss_and_is_noted(folders, capsys):
    notice.cache_clear()
    for normalization in ("none", "area"):
        szt = started("--loss_mask_dir", folders / "masks", "--mask_normalization", normalization,
                      train_data_dir=folders / "images")
        pair = szt.mask(torch.rand(2, 4, 8, 8), torch.rand(2, 4, 8, 8),
                        {"szt_mask": torch.zeros(2, 1, 64, 64)})
        assert not any(each.any() for each in pair)
    assert capsys.readouterr().err.count("Nothing is learned from a batch whose masks are cropped away") == 1


def test_the_frames_of_a_video_share_a_mask_and_tokens_have_none(folders):
    szt = started("--loss_mask_dir", folders / "masks", train_data_dir=folders / "images")
    video, batch = torch.rand(2, 4, 3, 8, 8) + 1, {"szt_mask": (torch.rand(2, 1, 64, 64) > 0.99).float()}
    for each in szt.mask(video, video, batch):
        for frame in range(3):
            assert torch.equal(each[:, :, frame], szt.mask(video[:, :, frame], video[:, :, 0], batch)[0])
    with pytest.raises(InputError, match="packs its prediction into tokens .*leave out --loss_mask_dir"):
        szt.mask(torch.rand(2, 16, 64), torch.rand(2, 16, 64), batch)


def test_images_are_found_wherever_the_script_reads_them(folders, tmp_path):
    flags = ["--loss_mask_dir", folders / "masks"]
    (tmp_path / "deep").mkdir()
    halves = [tmp_path / "a", tmp_path / "b"]
    for i, path in enumerate(sorted((folders / "images").iterdir())):
        for copy in (tmp_path / "deep" / "sub" / path.name, halves[i % 2] / path.name):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    expected = {path.name for path in (folders / "masks").iterdir()}
    for args in ({"instance_data_dir": str(folders / "images")}, {"dataset_name": str(folders / "images")},
                 {"train_data_dir": str(tmp_path / "deep")},
                 {"concepts_list": [{"instance_data_dir": str(half)} for half in halves]}):
        assert {mask.name for mask in started(*flags, **args).masks.values()} == expected
    for args in ({}, {"dataset_name": None}, {"dataset_name": "someone/images"}):
        with pytest.raises(SystemExit, match="--loss_mask_dir needs images in a local folder"):
            started(*flags, **args)


@pytest.mark.parametrize("rank, is_shown", [(None, True), ("0", True), ("1", False)])
def test_only_the_first_process_says_what_it_does(monkeypatch, capsys, rank, is_shown):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    started("--t_min", "500")
    assert ("Safe-Zone Training: " in capsys.readouterr().out) == is_shown


def test_class_images_draw_from_all_timesteps_in_every_way():
    """The second half of a batch, however the script draws: a number, an index or a density."""
    ddpm, flow = DDPMScheduler(), FlowMatchEulerDiscreteScheduler()
    numbers = started("--t_min", "900", with_prior_preservation=True).timesteps(ddpm, 400, device=None)
    szt = started("--t_min", "900", with_prior_preservation=True, scheduler=flow)
    indices = flow.timesteps[szt.indices(flow, 400)]
    density = szt.density(lambda batch_size: torch.rand(batch_size), flow)(batch_size=400)
    for drawn in (numbers, indices, flow.timesteps[(density * 1000).long()]):
        assert drawn[:200].min() >= 900 and drawn[200:].min() < 100
    assert szt.instances(torch.arange(6)).tolist() == [0, 1, 2]
    assert started("--t_min", "900").instances(torch.arange(6)).tolist() == list(range(6))


def test_without_jpeg_and_masks_an_example_stays_as_it_is():
    pixels = torch.rand(3, 8, 8) * 2 - 1  # between the levels of a file, as of an interpolated image
    assert torch.equal(started("--t_min", "500").prepare(pixels, None)[0], pixels)
    assert not torch.equal(started("--jpeg_quality", "100").prepare(pixels, None)[0], pixels)


def test_a_data_set_has_the_attributes_of_the_scripts_own():
    class Images:
        num_images = 3

    data = started("--jpeg_quality", "25").dataset(Images)()
    assert data.num_images == 3
    with pytest.raises(AttributeError, match="num_masks"):
        data.num_masks  # noqa: B018


def test_the_timesteps_stay_on_the_device_of_the_script():
    assert "szt.timesteps(noise_scheduler, bsz, device='cpu')" in patch_script(PLAIN)
    assert "szt.timesteps(noise_scheduler, bsz, device=model_input.device)" in patch_script(COLUMNS)
    assert "bsz, device=None)" in patch_script(PLAIN.replace(', device="cpu")', ")"))


def test_only_marked_lines_differ():
    for source in SCRIPTS.values():
        lines, old = patch_script(source).splitlines(), source.splitlines()
        marked = [line for line in lines if line.endswith("  # SZT")]
        kept = [line for line in lines if line not in marked]
        assert 7 <= len(marked) <= 10 and set(kept) <= set(old)
        assert len(old) - len(kept) <= len(marked)  # what was changed, not what was inserted


@pytest.mark.parametrize("name, old, new, message", [
    ("plain", "enumerate(train_dataloader)", "enumerate(batches)", "0 places look like its training loop"),
    ("plain", "def parse_args", "def get_args", "0 places look like its function parse_args"),
    ("plain", "self.image_paths[i])", "self.image_paths[i]).copy()", "0 places look like its reading"),
    ("plain", "timesteps = timesteps.long()", "timesteps = timesteps // 2", "draws timesteps in a way"),
    ("plain", "(0, noise_scheduler", "(1, noise_scheduler", "random whole numbers that are not known"),
    ("plain", "F.mse_loss(model", "F.huber_loss(model", "loss of a prediction and a target is not found"),
    ("plain", "train_dataset = Textual(", "train_dataset = make(Textual, ", "0 places look like its class"),
    ("columns", "train_dataset = dataset", "x = dataset.with_transform(0)\n    train_dataset = dataset",
     "2 places look like its transform"),
    ("columns", "loss = loss.mean()\n", "loss = other(model_pred, target)\n",
     "takes a loss that is not known"),
    ("flow", "(1.0 - sigmas) * model_input + sigmas * noise", "(1.0 - sigmas) * noise + sigmas * model_input",
     "does not mix latents and noise as its scheduler"),
    ("flow", "timesteps = noise_scheduler_copy.timesteps[indices]", "timesteps = other.timesteps[indices]",
     "0 places look like its reading of the scheduler's timesteps"),
    ("flow", "torch.chunk(model_pred, 2, dim=0)", "model_pred[:1], model_pred[1:]", "class images of prior"),
    ("flow", "latents_cache.append(encode", "latents_cache.extend(encode", "0 places look like its cache"),
    ("plain", "import argparse", "import argparse  # SZT", "is patched already"),
    ("plain", "def encode(", "def encode((", "is not a Python script"),
    ("flow", "for img in instance_images", "for img in all_images", "0 places look like its reading of the"),
    ("plain", "timesteps = timesteps.long()",
     "timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (bsz,))",
     "its draw of timesteps is not found once"),
    ("plain", "timesteps = timesteps.long()",
     "timesteps = torch.randint(0, args.other.config.num_train_timesteps, (bsz,))",
     "its draw of timesteps is not found once"),
    ("flow", "noise = torch.randn_like(model_input)",
     "places = torch.randint(0, args.other.config.num_train_timesteps, (bsz,))\n"
     "                timesteps = args.other.timesteps[places]", "its draw of timesteps is not found once"),
    ("plain", '(bsz,), device="cpu")', "(bsz,), generator=None)", "random whole numbers that are not known"),
    ("plain", "F.mse_loss(model_pred.float()", "F.mse_loss(model_pred[0].float()",
     "loss of a prediction and a target is not found"),
    ("flow", "batch_size=bsz", "size=bsz", "density of timesteps is called in a way that is not known"),
    ("columns", "for image in examples[image_column]]",
     "for image in examples[image_column]] + [image for image in examples['more']]",
     "its column of images is not found"),
    ("plain", '"--resolution"', '"--size"', "its flags, among them --resolution, are not found"),
    ("plain", "    noise_scheduler = DDPMScheduler(", "    later = DDPMScheduler(",
     "'noise_scheduler' is not made before its data set"),
    ("plain", "args = parse_args(input_args)", "flags = parse_args(input_args)", "knows no 'args'")])
def test_a_script_whose_places_are_not_found_is_refused(name, old, new, message):
    assert SCRIPTS[name].count(old) >= 1
    with pytest.raises(InputError, match=message):
        patch_script(SCRIPTS[name].replace(old, new), "train.py")


def test_class_images_and_min_snr_agree_on_the_timesteps():
    """Diffusers' DreamBooth weights B instances by 2 B timesteps; the instances' are those that count."""
    prior = """
                if args.with_prior_preservation:
                    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
                    target, target_prior = torch.chunk(target, 2, dim=0)
                if args.snr_gamma is None:"""
    text = patch_script(COLUMNS.replace("\n                if args.snr_gamma is None:", prior))
    added, weighing = "timesteps = szt.instances(timesteps)  # SZT\n", "snr = compute_snr("
    assert text[text.index(added):text.index(weighing)].split("\n")[1].strip() == ""


def test_the_command_prints_the_script_and_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "train.py").write_text(PLAIN)
    main([str(tmp_path / "train.py")])
    assert capsys.readouterr().out == patch_script(PLAIN)
    (tmp_path / "other.py").write_text("print('hello')\n")
    for path, message in ((tmp_path / "other.py", "'other.py' cannot be patched: 0 places look like its"),
                          (tmp_path / "none.py", "none.py")):
        with pytest.raises(SystemExit) as leaving:
            main([str(path)])
        assert message in str(leaving.value) and capsys.readouterr().out == ""


# Real scripts, of a checkout of Diffusers: DIFFUSERS_EXAMPLES=diffusers/examples pytest -m slow -k real

REAL = os.environ.get("DIFFUSERS_EXAMPLES")
NEEDED = ["textual_inversion", "textual_inversion_sdxl", "train_text_to_image_lora",
          "train_text_to_image_lora_sdxl", "train_dreambooth", "train_dreambooth_lora",
          "train_dreambooth_lora_sdxl", "train_dreambooth_lora_sd3", "train_dreambooth_lora_flux",
          "train_custom_diffusion"]


def real_script(name):
    return next(Path(REAL).rglob(f"{name}.py"))


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="DIFFUSERS_EXAMPLES names no folder of Diffusers' examples")
@pytest.mark.parametrize("name", NEEDED)
def test_real_scripts_are_patched_by_few_lines(name):
    text = patch_script(real_script(name).read_text(), name)
    ast.parse(text)
    assert 7 <= text.count("  # SZT\n") <= 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models by name, images, their masks, class images, and a data set with captions."""
    from szt_utils import pocket

    root = tmp_path_factory.mktemp("real")
    pocket.write_concept("teal-striped-star", root / "images", root / "masks", 4)
    pocket.write_concept("teal-striped-star", root / "class", None, 4, seed=5)
    paths = pocket.write_concept("teal-striped-star", root / "captioned" / "train", None, 4)
    (root / "captioned" / "train" / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": path.name, "text": "a photo of a star"}) + "\n" for path in paths))
    models = {"pocket": pocket.model_path(), "sdxl": build_tiny_sdxl(root / "sdxl"),
              "sd3": build_tiny_sd3(root / "sd3"), "flux": build_tiny_flux(root / "flux")}
    return root, models


def run_real(script, monkeypatch, *flags):
    """Run a script in this process, as a command line would."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, flags)])
    runpy.run_path(str(script), run_name="__main__")


TOKEN = ["--placeholder_token", "<star>", "--initializer_token", "star"]
PRIOR = ["--with_prior_preservation", "--num_class_images", 4, "--class_prompt", "a circle"]
RUNS = [("textual_inversion", "pocket", "train_data_dir", TOKEN),
        ("textual_inversion_sdxl", "sdxl", "train_data_dir", TOKEN),
        ("train_text_to_image_lora", "pocket", "captioned", ["--random_flip", "--snr_gamma", 5]),
        ("train_text_to_image_lora_sdxl", "sdxl", "captioned", ["--random_flip"]),
        ("train_dreambooth", "pocket", "instance_data_dir", PRIOR),
        ("train_dreambooth_lora", "pocket", "instance_data_dir", PRIOR),
        ("train_dreambooth_lora_sdxl", "sdxl", "instance_data_dir", [*PRIOR, "--random_flip"]),
        ("train_dreambooth_lora_sdxl", "sdxl", "instance_data_dir", ["--do_edm_style_training"]),
        ("train_dreambooth_lora_sd3", "sd3", "instance_data_dir",
         [*PRIOR, "--cache_latents", "--train_batch_size", 1]),
        ("train_dreambooth_lora_flux", "flux", "instance_data_dir", [*PRIOR, "--cache_latents"]),
        ("train_custom_diffusion", "pocket", "instance_data_dir",
         [*PRIOR, "--hflip", "--modifier_token", "<new1>", "--initializer_token", "star"])]


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="DIFFUSERS_EXAMPLES names no folder of Diffusers' examples")
@pytest.mark.parametrize("name, model, data, more", RUNS, ids=[f"{each[0]}-{len(each[3])}" for each in RUNS])
def test_real_scripts_off_are_the_originals_and_on_are_safe(name, model, data, more, world, tmp_path,
                                                            monkeypatch):
    if "lora" in name:
        pytest.importorskip("peft")
    root, models = world
    images = root / "captioned" if data == "captioned" else root / "images"
    flags = ["--pretrained_model_name_or_path", models[model],
             "--train_data_dir" if data == "captioned" else f"--{data}", images, "--resolution", 64,
             "--train_batch_size", 2, *more, "--max_train_steps", 3, "--seed", 1, "--learning_rate", "1e-2"]
    if data == "instance_data_dir":
        flags += ["--instance_prompt", "a <new1> star" if "custom" in name else "a star"]
    if more[:1] == PRIOR[:1]:
        flags += ["--class_data_dir", root / "class"]
    # The tokenizers of the tiny models take 24 tokens.
    source, original, script = real_script(name).read_text().replace("=77", "=24"), *(
        tmp_path / f"{name}{ending}.py" for ending in ("", "_szt"))
    original.write_text(source)
    script.write_text(patch_script(source, name))
    run_real(original, monkeypatch, *flags, "--output_dir", tmp_path / "original")
    run_real(script, monkeypatch, *flags, "--output_dir", tmp_path / "off")
    learned = tensors(tmp_path / "original")
    assert learned and same(learned, tensors(tmp_path / "off"))

    levels, outside = [], []
    monkeypatch.setattr(patched.SafeZoneTraining, "mask", watch(patched.SafeZoneTraining.mask, outside))
    for draw in ("indices", "restrict"):
        monkeypatch.setattr(SafeZone, draw, watch_draws(getattr(SafeZone, draw), draw, levels))
    run_real(script, monkeypatch, *flags, "--szt", "--loss_mask_dir", root / "masks",
             "--output_dir", tmp_path / "on")
    assert len(levels) == len(outside) == 3
    assert all(drawn.min() >= t_min for drawn, t_min in levels)
    assert all(wrong == 0 and right > 0 for wrong, right in outside)
    assert not same(learned, tensors(tmp_path / "on"))


def tensors(folder):
    """All tensors of the files in a folder; their headers are written in no certain order."""
    return {(path.relative_to(folder), name): tensor for path in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def watch(real, outside):
    """Record the largest gradient of the instances outside and inside their masks."""
    def mask(self, prediction, target, batch, step=0):
        masks = self._cached[step] if self._cached else batch["szt_mask"]
        cells = to_latent_grid(masks, prediction.shape[-2:])
        prediction.register_hook(lambda gradient: outside.append(
            [(gradient[:len(cells)] * part).abs().max().item() for part in (1 - cells, cells)]))
        return real(self, prediction, target, batch, step)
    return mask


def watch_draws(real, draw, seen):
    """Record what the instances' timesteps are in DDPM's count, and the threshold."""
    def drawing(self, scheduler, count, *args, prior_preservation=False, **options):
        from szt_utils.schedules import Schedule

        schedule = Schedule(scheduler)
        drawn = real(self, scheduler, count, *args, prior_preservation=prior_preservation, **options)
        indices = drawn if draw == "indices" else (drawn * len(schedule.timesteps)).long()
        own = count // 2 if prior_preservation else count
        seen.append((schedule.t[indices[:own]], self.t_min))
        return drawn
    return drawing



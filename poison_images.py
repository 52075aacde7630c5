"""Poison pictures against latent diffusion models (paper Eq. 4 and 5):
a folder in, a folder of PNGs with the same names out.

    python poison_images.py --pretrained_model_name_or_path MODEL --image_dir pictures \
        --output_dir poisoned --method adm+

Pictures are cut to their central square and resized to --resolution, or keep their size with --keep_size, and
are changed by at most --eps levels. Sub-folders keep their structure. The same command again resumes.
A picture's randomness is its own, so neither the other pictures nor their order change a result; with
--batch_size above 1 they may change the last bits of its gradient, of which a sign step makes whole levels.

An attack becomes adaptive, against a defence that it knows, by --jpeg_quality, --t_min and --loss_mask_dir,
or by --adaptive szt for all three. Then the plain attack is run too, and a warning tells when that would have
done better.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from szt_utils.arguments import number
from szt_utils.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    import torch

# The names in szt_utils.objectives.POISONS, spelled out so that --help need not import torch.
METHODS = ("adm+", "adm-", "sds+", "sds-", "ea", "da")
DEFAULTS = dict(eps=16, step_size=1.0, steps=100, step_schedule="constant", norm="linf", draws=1,
                prompt="a photo", target_image="pattern")
# What published code does where it differs from that; eps is rounded down to whole levels.
PRESETS = {
    # Xue et al. 2024: all as above.
    "diff-protect": {"adm+": {}, "adm-": {}, "sds+": {}, "sds-": {}, "ea": {}},
    # Salman et al. 2023. EA: eps 0.12 and steps of 0.01 in [-1, 1], towards a grey picture. DA: L2 norms of
    # 16 and 1 over 3 x 512 x 512 elements.
    "photoguard": {
        "ea": dict(eps=15, step_size=1.275, steps=200, step_schedule="linear", target_image="grey"),
        "da": dict(norm="l2", eps=2, step_size=0.144, steps=200, draws=10, prompt="", target_image="grey"),
    },
}
# Flags that only some methods heed: to others they would be a silent mistake.
HEEDED_BY = {"target_image": ("ea", "da"), "chain_steps": ("da",), "strength": ("da",),
             "guidance_scale": ("da",), "t_min": METHODS[:4], "t_max": METHODS[:4],
             "draws": METHODS[:4] + ("da",), "prompt": METHODS[:4] + ("da",)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="Stable Diffusion in Diffusers format: folder or hub name.")
    add("--revision", help="Revision of the model on the hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--image_dir", required=True, help="Folder of the pictures to poison, with its sub-folders.")
    add("--output_dir", required=True, help="Folder for the poisoned PNGs, options.json and stats.jsonl.")
    add("--method", required=True, choices=METHODS, help="The poison.")
    add("--preset", choices=PRESETS, help="Defaults of a published implementation for --method.")
    add("--eps", type=number(int, 0, 255, unit=" of 1/255 levels"), help="Budget, in 1/255 levels. (16)")
    add("--norm", choices=["linf", "l2"],
        help="What the budget bounds: every change, or their root mean square. (linf)")
    add("--step_size", type=number(float, 0, above=True), help="Length of one step, in 1/255 levels. (1)")
    add("--step_schedule", choices=["constant", "linear"],
        help="Whether steps keep their length or fall to a hundredth. (constant)")
    add("--steps", type=number(int, 0), help="Number of steps. (100)")
    add("--draws", type=number(int, 1), help="Draws of timestep and noise averaged in one step. (1)")
    add("--t_min", type=number(int, 0), help="Lowest timestep to attack. (0)")
    add("--t_max", type=number(int, 1),
        help="First timestep above the range to attack. (the model's num_train_timesteps)")
    add("--prompt", help="Prompt of the attacked model. (a photo)")
    add("--target_image",
        help="ea, da: 'pattern', 'grey', 'zero' (ea: the latent of zeros) or a picture. (pattern)")
    add("--chain_steps", type=number(int, 1), help="da: denoising steps of the attacked image-to-image. (4)")
    add("--strength", type=number(float, 0, 1, above=True), help="da: its noise level, up to 1. (0.8)")
    add("--guidance_scale", type=number(float, 0, above=True), help="da: its classifier-free guidance. (7.5)")
    add("--mask_dir", help="Folder of masks, <stem>.png, white where a picture may be changed. (everywhere)")
    add("--jpeg_quality", type=number(int, 1, 100), nargs="+", metavar="Q",
        help="Attack through JPEG of this quality, or of a random one between two at every step.")
    add("--loss_mask_dir",
        help="Folder of masks, <stem>.png: attack only what training inside them will see.")
    add("--mask_dilation", type=number(int, 0), default=16, help="Growth of the loss masks, in pixels. (16)")
    add("--adaptive", choices=["szt"],
        help="--jpeg_quality 25 and --t_min 500; with --loss_mask_dir, all that Safe-Zone Training does.")
    add("--resolution", type=number(int, 8), default=512,
        help="Side of the square pictures, or with --keep_size the shorter side during the attack, in "
             "pixels. (512)")
    add("--keep_size", action="store_true",
        help="Do not crop: attack the whole picture at --resolution, enlarge the change, add it to the "
             "original.")
    add("--batch_size", type=number(int, 1), default=1, help="Pictures attacked together. (1)")
    add("--one_graph", action="store_true",
        help="adm+, adm-, da: keep the encoder's graph beside the U-Net's; faster by an encoding a step, for "
             "more memory.")
    add("--seed", type=int, default=0, help="Seed of the start, noise and timesteps. (0)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no",
        help="Precision of the model. (no)")
    args = parser.parse_args(argv)

    for name, methods in HEEDED_BY.items():
        if getattr(args, name) is not None and args.method not in methods:
            parser.error(f"argument --{name}: {args.method} does not use it, only {', '.join(methods)}")
    if args.preset and args.method not in PRESETS[args.preset]:
        parser.error(f"argument --preset: {args.preset} has no {args.method}, "
                     f"only {', '.join(PRESETS[args.preset])}")
    if args.method == "da" and args.target_image == "zero":
        parser.error("argument --target_image: zero is a latent, and da needs a picture")
    if args.jpeg_quality and len(args.jpeg_quality) > 2:
        parser.error("argument --jpeg_quality: one quality or the lowest and the highest")
    if args.adaptive:
        if not args.loss_mask_dir:
            parser.error("argument --adaptive: szt needs --loss_mask_dir")
        args.jpeg_quality = args.jpeg_quality or [25]
        if args.method in HEEDED_BY["t_min"] and args.t_min is None:
            args.t_min = 500
    defaults = {**DEFAULTS, "t_min": 0, "chain_steps": 4, "strength": 0.8, "guidance_scale": 7.5,
                **(PRESETS[args.preset][args.method] if args.preset else {})}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def is_adaptive(args: argparse.Namespace) -> bool:
    """Whether the attack is aimed at a defence."""
    return bool(args.jpeg_quality or args.loss_mask_dir or args.t_min or args.t_max)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture to poison: its files, and its name among the results."""

    name: str
    path: Path
    mask_path: Path | None
    loss_mask_path: Path | None


def find_pictures(args: argparse.Namespace) -> list[Picture]:
    """Every picture of --image_dir with its masks; what lacks one raises InputError."""
    from szt_utils.images import name_results
    from szt_utils.masks import find_masks

    root, by_folder, found = Path(args.image_dir), {}, []
    for name, path in name_results(root).items():
        by_folder.setdefault(path.parent.relative_to(root), {})[name] = path
    for folder, named in by_folder.items():
        masks, loss_masks = (find_masks(Path(masks) / folder, list(named.values())) if masks
                             else [None] * len(named) for masks in (args.mask_dir, args.loss_mask_dir))
        found += map(Picture, named, named.values(), masks, loss_masks)
    return found


def attacked_size(size: tuple[int, int], args: argparse.Namespace) -> tuple[int, int]:
    """Width and height of a picture during the attack."""
    if not args.keep_size:
        return args.resolution, args.resolution
    return tuple(max(8, round(side * args.resolution / min(size) / 8) * 8) for side in size)


def scaled(image, args: argparse.Namespace, resample=None):
    """A picture or mask as the attack sees it, float32 (1, C, h, w) in [0, 1]."""
    from PIL import Image

    from szt_utils.images import crop_and_resize, from_pil

    resample = Image.Resampling.BICUBIC if resample is None else resample
    return from_pil(image.resize(attacked_size(image.size, args), resample) if args.keep_size
                    else crop_and_resize(image, args.resolution, True, resample))


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A picture as it is changed and as it is attacked, float32 in [0, 1]; no mask is None."""

    original: "torch.Tensor"  # (1, 3, H, W)
    mask: "torch.Tensor | None"  # (1, 1, H, W), 1 where it may be changed
    attacked: "torch.Tensor"  # (1, 3, h, w)
    attacked_mask: "torch.Tensor | None"
    loss_mask: "torch.Tensor | None"  # (1, 1, h, w), 1 where errors count

    def sha256(self) -> str:
        parts = [part for part in (self.original, self.mask, self.loss_mask) if part is not None]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def read_picture(picture: Picture, args: argparse.Namespace) -> Tensors:
    """Read a picture and its masks; InputError when a file cannot be used."""
    from PIL import Image

    from szt_utils.images import from_pil, read_image
    from szt_utils.masks import dilate, read_mask

    def stencil(path):
        if path is None:
            return None, None
        whole = read_mask(path, image.size)
        part = scaled(whole, args, Image.Resampling.NEAREST)
        if not part.any():
            raise InputError(f"The mask '{path}' is black within the central square, or too fine for "
                             f"--resolution {args.resolution}: no pixel of the picture would count.")
        return from_pil(whole) if args.keep_size else part, part

    image = read_image(picture.path)
    attacked = scaled(image, args)
    mask, attacked_mask = stencil(picture.mask_path)
    _, loss_mask = stencil(picture.loss_mask_path)
    return Tensors(from_pil(image) if args.keep_size else attacked, mask, attacked, attacked_mask,
                   None if loss_mask is None else dilate(loss_mask, args.mask_dilation))


def target_of(args: argparse.Namespace, height: int, width: int):
    """The target picture of --target_image, (1, 3, height, width) in [0, 1]; None is the latent of zeros."""
    import torch

    from szt_utils.images import from_pil, read_image
    from szt_utils.objectives import target_pattern

    if args.target_image == "zero":
        return None
    if args.target_image == "pattern":
        return target_pattern(height, width)
    if args.target_image == "grey":
        return torch.full((1, 3, height, width), 128 / 255)
    return from_pil(read_image(args.target_image).resize((width, height)))


def load_attack(args: argparse.Namespace):
    """What is attacked, on the GPU if there is one, after checking what fits the model."""
    import torch

    from szt_utils.diffusion import LatentDiffusion
    from szt_utils.objectives import Attack
    from szt_utils.timesteps import check_range

    torch.backends.cudnn.deterministic = True  # the same picture twice has the same gradient
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    model = LatentDiffusion.load(args.pretrained_model_name_or_path, revision=args.revision,
                                 variant=args.variant, dtype=dtype,
                                 device="cuda" if torch.cuda.is_available() else "cpu")
    num_train_timesteps = model.scheduler.config.num_train_timesteps
    t_max = num_train_timesteps if args.t_max is None else args.t_max
    check_range(args.t_min, t_max, num_train_timesteps)
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    if args.resolution % factor:
        raise InputError(f"The model needs a --resolution that is a multiple of {factor}, "
                         f"but it is {args.resolution}.")
    return Attack(model, model.embed_text(args.prompt), args.t_min, t_max, args.draws,
                  jpeg_qualities=args.jpeg_quality and (min(args.jpeg_quality), max(args.jpeg_quality)),
                  one_graph=args.one_graph, empty_states=model.embed_text(""), chain_steps=args.chain_steps,
                  strength=args.strength, guidance_scale=args.guidance_scale)


def attack_batch(args: argparse.Namespace, attack, batch: list[Tensors], on_step) -> list:
    """Attack pictures of one size together; each (1, 3, H, W) as it will be saved."""
    import torch

    from szt_utils.objectives import find_poison, image_generator, image_gradient
    from szt_utils.pgd import pgd

    poison, device = find_poison(args.method), attack.model.device
    images = torch.cat([tensors.attacked for tensors in batch]).to(device)
    masks = torch.cat([tensors.attacked_mask for tensors in batch]).to(device) if args.mask_dir else None
    generators = [image_generator(image, args.seed) for image in images]
    attacked = pgd(images, image_gradient(poison, attack, generators), eps=args.eps, step_size=args.step_size,
                   steps=args.steps, ascend=poison.ascend, norm=args.norm, schedule=args.step_schedule,
                   mask=masks, generators=generators if poison.random_start else None, on_step=on_step)
    return [add_change(args, tensors, change)
            for tensors, change in zip(batch, (attacked - images).cpu().split(1), strict=True)]


def add_change(args: argparse.Namespace, tensors: Tensors, change):
    """The original plus a change (1, 3, h, w), enlarged where need be, within the budget at full size."""
    import torch.nn.functional as F

    from szt_utils.pgd import add_within_budget, project

    if args.keep_size:
        change = F.interpolate(change, tensors.original.shape[-2:], mode="bicubic", antialias=True)
        change = change if tensors.mask is None else change * tensors.mask
        change = project(change, args.eps, args.norm)
    return add_within_budget(tensors.original, change, args.eps, args.norm)


def poison(args: argparse.Namespace, attack, batch: list[Picture], output_dir: Path, on_step,
           tell) -> list[dict]:
    """Poison pictures that have one size during the attack; save them, and return their records."""
    import torch

    from szt_utils.images import from_pil, read_image, save_png, to_pil
    from szt_utils.objectives import find_poison, image_generator, measure
    from szt_utils.pgd import rms, warn_if_unmoved

    start, device, method = time.perf_counter(), attack.model.device, find_poison(args.method)
    read = [read_picture(picture, args) for picture in batch]
    images = [tensors.attacked for tensors in read]
    if args.loss_mask_dir:
        attack = dataclasses.replace(attack, loss_mask=torch.cat([t.loss_mask for t in read]).to(device))
    if args.method in HEEDED_BY["target_image"]:
        attack = dataclasses.replace(attack, target=target_of(args, *images[0].shape[-2:]))

    def objective(pictures):
        return measure(method, attack, torch.cat(pictures).to(device),
                       [image_generator(image[0], args.seed, "measure") for image in images])

    def as_read(pictures):
        """Finished pictures as a model will see them."""
        return [scaled(to_pil(picture)[0], args) for picture in pictures] if args.keep_size else pictures

    with told(tell):
        results = attack_batch(args, attack, read, on_step)
    before, after = objective(images), objective(as_read(results))
    compared = None
    if is_adaptive(args):
        plain = dataclasses.replace(attack, jpeg_qualities=None, loss_mask=None, t_min=0,
                                    t_max=attack.model.scheduler.config.num_train_timesteps)
        compared = objective(as_read(attack_batch(args, plain, read, on_step)))

    records = []
    for i, (picture, tensors, result) in enumerate(zip(batch, read, results, strict=True)):
        with told(lambda message, name=picture.path.name: tell(f"{name}: {message}")):
            if args.steps and args.eps:
                warn_if_unmoved(before[i:i + 1], after[i:i + 1], method.ascend)
            if compared is not None and (after[i] - compared[i]) * (1 if method.ascend else -1) < 0:
                warnings.warn(f"The plain attack would have brought this objective to {compared[i]:.6g}, the "
                              f"adaptive one to {after[i]:.6g}; give it more --steps or --draws.",
                              stacklevel=1)
        save_png(to_pil(result)[0], output_dir / picture.name)
        change = (from_pil(read_image(output_dir / picture.name)) - tensors.original) * 255
        records.append(dict(
            file=picture.name, source=picture.path.name, sha256=tensors.sha256(),
            eps_reached=int(change.abs().max().round()), rms_reached=round(rms(change).item(), 3),
            objective_before=before[i].item(), objective_after=after[i].item(),
            objective_plain=None if compared is None else compared[i].item()))
    seconds = round((time.perf_counter() - start) / len(batch), 3)
    return [{**record, "seconds": seconds} for record in records]


@contextlib.contextmanager
def told(tell):
    """Pass warnings to `tell` when the block ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in caught:
        tell(message.message)


def run(args: argparse.Namespace) -> None:
    from szt_utils.images import read_image
    from szt_utils.records import append_stats, open_run, provenance, write_json

    arguments = {name: value for name, value in vars(args).items() if name != "output_dir"}
    output_dir = Path(args.output_dir)
    finished = {record["file"]: record["sha256"]
                for record in open_run(output_dir, Path(__file__).name, arguments, args.image_dir)
                if (output_dir / record["file"]).exists()}
    # Every file is read once before any work: what cannot be used must not stop a run half-way.
    pictures, work = find_pictures(args), {}
    for picture in pictures:
        tensors = read_picture(picture, args)
        if finished.get(picture.name) != tensors.sha256():
            work.setdefault(tensors.attacked.shape, []).append(picture)
    if args.target_image not in ("pattern", "grey", "zero"):
        read_image(args.target_image)
    count = sum(map(len, work.values()))
    print(f"{len(pictures)} pictures in '{args.image_dir}', {count} of them to do.")
    if not work:
        return

    from tqdm.auto import tqdm

    attack = load_attack(args)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "options.json", {"script": Path(__file__).name, "arguments": arguments,
                                             "t_min": attack.t_min, "t_max": attack.t_max, **provenance()})
    total = count * args.steps * (2 if is_adaptive(args) else 1)
    with tqdm(total=total, unit="step", desc=args.method) as progress:
        def on_step(values):
            progress.update(len(values))
            progress.set_postfix(file=batch[0].name, objective=f"{values.mean():.4f}", refresh=False)

        def tell(message):
            progress.write(f"warning: {message}")

        for same_size in work.values():
            for i in range(0, len(same_size), args.batch_size):
                batch = same_size[i:i + args.batch_size]
                append_stats(output_dir / "stats.jsonl",
                             poison(args, attack, batch, output_dir, on_step, tell))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        run(args)


if __name__ == "__main__":
    main()

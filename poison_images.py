"""Poison pictures against latent diffusion models (paper Eq. 4):
a folder in, a folder of PNGs with the same stems out.

    python poison_images.py --pretrained_model_name_or_path MODEL --image_dir pictures \
        --output_dir poisoned --method adm+

Pictures are cut to their central square and resized, and changed by at most --eps levels per pixel and
channel. They are attacked one by one: a batch would change the last bits of the gradient, and a sign step
makes whole levels of them. So a result depends on nothing but the picture and the options. The same
command again resumes.
"""

import argparse
import hashlib
import json
import time
import warnings
from pathlib import Path

from szt_utils.errors import InputError, exit_on_input_error

# The names in szt_utils.objectives.POISONS, spelled out so that --help need not import torch.
METHODS = ("adm+",)


def whole_number(lowest: int, highest: int | None = None, unit: str = ""):
    """An argparse type: an integer from `lowest` to `highest`."""
    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number{unit}") from None
        if number < lowest:
            raise argparse.ArgumentTypeError(f"{number} is below {lowest}")
        if highest is not None and number > highest:
            raise argparse.ArgumentTypeError(f"{number} is above {highest}")
        return number
    return convert


def positive_number(text: str) -> float:
    """An argparse type: a finite float above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="Stable Diffusion in Diffusers format: folder or hub name.")
    add("--revision", help="Revision of the model on the hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--image_dir", required=True, help="Folder of the pictures to poison.")
    add("--output_dir", required=True, help="Folder for the poisoned PNGs, options.json and stats.jsonl.")
    add("--method", required=True, choices=METHODS, help="The poison.")
    add("--eps", type=whole_number(0, 255, " of 1/255 levels"), default=16,
        help="Largest change, in 1/255 levels. (16)")
    add("--step_size", type=positive_number, default=1.0, help="Length of one step, in 1/255 levels. (1)")
    add("--steps", type=whole_number(0), default=100, help="Number of steps. (100)")
    add("--draws", type=whole_number(1), default=1,
        help="Draws of timestep and noise averaged in one step. (1)")
    add("--t_min", type=whole_number(0), default=0, help="Lowest timestep to attack. (0)")
    add("--t_max", type=whole_number(1),
        help="First timestep above the range to attack. (the model's num_train_timesteps)")
    add("--prompt", default="a photo", help="Prompt of the attacked model. (a photo)")
    add("--mask_dir", help="Folder of masks, <stem>.png, white where a picture may be changed. (everywhere)")
    add("--resolution", type=whole_number(1), default=512,
        help="Side of the square pictures, in pixels. (512)")
    add("--seed", type=int, default=0, help="Seed of the start, noise and timesteps. (0)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no",
        help="Precision of the model. (no)")
    return parser.parse_args(argv)


def open_output(output_dir: Path, image_dir: Path, arguments: dict) -> dict[str, str]:
    """Check that the output folder is new or of the same run;
    returns the finished files and the sha256 of their sources."""
    from szt_utils.records import read_stats

    if output_dir.resolve() == image_dir.resolve():
        raise InputError(f"--output_dir and --image_dir are the same folder, '{output_dir}'; "
                         "give another --output_dir.")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir '{output_dir}' is not a folder; give another one.")
    if not output_dir.exists() or all(path.name.startswith(".") for path in output_dir.iterdir()):
        return {}
    try:
        options = json.loads((output_dir / "options.json").read_text())
        ours, before = options["script"] == Path(__file__).name, options["arguments"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise InputError(f"The folder '{output_dir}' holds files that are not of this script; "
                         "give another --output_dir.")
    changed = [f"--{name}" for name, value in arguments.items()
               if name not in before or before[name] != value]
    if changed:
        raise InputError(f"The folder '{output_dir}' was made with another {', '.join(changed)}; "
                         "give another --output_dir.")
    stats = output_dir / "stats.jsonl"
    records = read_stats(stats) if stats.exists() else []
    return {record["file"]: record["sha256"] for record in records if (output_dir / record["file"]).exists()}


def read_picture(path: Path, mask_path: Path | None, resolution: int):
    """A picture as float32 (1, 3, R, R) in [0, 1], its mask (1, 1, R, R) or None, and the sha256 of both."""
    from szt_utils.images import crop_and_resize, from_pil, read_image
    from szt_utils.masks import prepare_mask, read_mask

    picture, mask = read_image(path), None
    if mask_path is not None:
        mask = prepare_mask(read_mask(mask_path, picture.size), resolution, center_crop=True)
        if not mask.any():
            raise InputError(f"The mask '{mask_path}' is black within the central square, "
                             "so nothing could be changed.")
    picture = crop_and_resize(picture, resolution, center_crop=True)
    digest = hashlib.sha256(picture.tobytes() + (b"" if mask is None else mask.numpy().tobytes())).hexdigest()
    return from_pil(picture), mask, digest


def find_pictures(image_dir: str, mask_dir: str | None,
                  resolution: int) -> list[tuple[Path, Path | None, str]]:
    """Path, mask path and sha256 of every picture;
    a file that cannot be used raises InputError here, before any work."""
    from szt_utils.images import list_images
    from szt_utils.masks import find_masks

    paths = list_images(image_dir)
    by_stem: dict[str, Path] = {}
    for path in paths:
        if path.stem in by_stem:
            raise InputError(f"'{by_stem[path.stem].name}' and '{path.name}' would both become "
                             f"'{path.stem}.png'; rename one.")
        by_stem[path.stem] = path
    mask_paths = find_masks(mask_dir, paths) if mask_dir else [None] * len(paths)
    return [(path, mask_path, read_picture(path, mask_path, resolution)[2])
            for path, mask_path in zip(paths, mask_paths, strict=True)]


def load_model(args: argparse.Namespace):
    """The model on the GPU if there is one, its prompt's states, and the timestep range,
    after checking what fits it."""
    import torch

    from szt_utils.diffusion import LatentDiffusion
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
    return model, model.embed_text(args.prompt), dict(t_min=args.t_min, t_max=t_max)


def poison_picture(args: argparse.Namespace, model, text_states, t_range: dict, images, mask, on_step):
    """Attack one picture; returns it, float32 (1, 3, R, R) in [0, 1],
    and its objective before and after on equal draws."""
    from szt_utils.objectives import find_poison, image_generator, image_gradient, measure
    from szt_utils.pgd import pgd, warn_if_unmoved

    def objective(pictures):
        return measure(poison, model, pictures, text_states,
                       [image_generator(images[0], args.seed, "measure")], **t_range)

    poison = find_poison(args.method)
    images, mask = images.to(model.device), None if mask is None else mask.to(model.device)
    generators = [image_generator(images[0], args.seed)]
    gradient = image_gradient(poison, model, text_states, generators, draws=args.draws, **t_range)
    poisoned = pgd(images, gradient, eps=args.eps, step_size=args.step_size, steps=args.steps,
                   ascend=poison.ascend, mask=mask, generators=generators if poison.random_start else None,
                   on_step=on_step)
    before, after = objective(images), objective(poisoned)
    if args.steps and args.eps:
        warn_if_unmoved(before, after, poison.ascend)
    return poisoned, before.item(), after.item()


def run(args: argparse.Namespace) -> None:
    arguments = {name: value for name, value in vars(args).items() if name != "output_dir"}
    output_dir = Path(args.output_dir)
    finished = open_output(output_dir, Path(args.image_dir), arguments)
    pictures = find_pictures(args.image_dir, args.mask_dir, args.resolution)
    work = [picture for picture in pictures if finished.get(f"{picture[0].stem}.png") != picture[2]]
    print(f"{len(pictures)} pictures in '{args.image_dir}', {len(work)} of them to do.")
    if not work:
        return

    from tqdm.auto import tqdm

    from szt_utils.images import from_pil, read_image, save_png, to_pil
    from szt_utils.records import append_stats, provenance, write_json

    model, text_states, t_range = load_model(args)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "options.json",
               {"script": Path(__file__).name, "arguments": arguments, **t_range, **provenance()})
    with tqdm(total=len(work) * args.steps, unit="step", desc=args.method) as progress:
        def on_step(values):
            progress.update()
            progress.set_postfix(file=name, objective=f"{values.mean():.4f}", refresh=False)

        for path, mask_path, digest in work:
            name, start = f"{path.stem}.png", time.perf_counter()
            images, mask, _ = read_picture(path, mask_path, args.resolution)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                poisoned, before, after = poison_picture(args, model, text_states, t_range, images, mask,
                                                         on_step)
            for message in caught:
                progress.write(f"warning: {path.name}: {message.message}")
            save_png(to_pil(poisoned)[0], output_dir / name)
            reached = ((from_pil(read_image(output_dir / name)) - images).abs().max() * 255).round()
            append_stats(output_dir / "stats.jsonl", [dict(
                file=name, source=path.name, sha256=digest, eps_reached=int(reached), objective_before=before,
                objective_after=after, seconds=round(time.perf_counter() - start, 3))])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        run(args)


if __name__ == "__main__":
    main()

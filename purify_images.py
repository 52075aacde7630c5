"""Purify pictures that may be poisoned (the defences of the paper's Table 1):
a folder in, a folder of PNGs with the same names out.

    python purify_images.py --image_dir pictures --output_dir purified --method advclean

advclean filters and jpeg compresses, without any model. regen sends each picture through an image-to-image
pipeline at little noise. pdmpure does so with a diffusion model of pixels: a DDPMPipeline, or DeepFloyd IF's
second stage with --upscaler, which the user must have. Pictures keep their size unless --resolution is given;
sub-folders keep their structure. The same command again resumes. A picture's randomness is its own, so
neither the other pictures nor their order change a result.
"""

import argparse
import functools
import hashlib
import time
from pathlib import Path

from szt_utils.arguments import number
from szt_utils.errors import InputError, exit_on_input_error

METHODS = ("advclean", "jpeg", "regen", "pdmpure")
# Flags that only some methods heed: to others they would be a silent mistake.
HEEDED_BY = {"jpeg_quality": ("jpeg",), "pretrained_model_name_or_path": ("regen", "pdmpure"),
             "revision": ("regen", "pdmpure"), "variant": ("regen", "pdmpure"), "upscaler": ("pdmpure",),
             "strength": ("regen", "pdmpure"), "steps": ("regen", "pdmpure"),
             "guidance_scale": ("regen", "pdmpure"), "prompt": ("regen", "pdmpure")}
POCKET = {"regen": "diffusion", "pdmpure": "pixel"}  # names of the bundled networks, for a hint


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image_dir", required=True, help="Folder of the pictures to purify, with its sub-folders.")
    add("--output_dir", required=True, help="Folder for the purified PNGs, options.json and stats.jsonl.")
    add("--method", required=True, choices=METHODS, help="The purifier.")
    add("--jpeg_quality", type=number(int, 1, 100), help="jpeg: its quality. (25)")
    add("--pretrained_model_name_or_path",
        help="regen: an image-to-image pipeline; pdmpure: a DDPMPipeline of pixels or DeepFloyd IF's "
             "second stage. Folder or hub name.")
    add("--revision", help="Revision of the model on the hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--upscaler", help="pdmpure by IF: a StableDiffusionUpscalePipeline, folder or hub name.")
    add("--strength", type=number(float, 0, 1, above=True),
        help="regen, pdmpure: noise level, up to 1. (regen 0.06, pdmpure 0.12, by IF 0.45)")
    add("--steps", type=number(int, 1),
        help="regen, pdmpure: steps of the whole schedule, of which --strength is taken. (50, by IF 110)")
    add("--guidance_scale", type=number(float, 0, above=True),
        help="regen, pdmpure by IF: classifier-free guidance. (regen 7.5, IF 7)")
    add("--prompt", help="regen, pdmpure by IF: the prompt. (regen '', IF 'a picture')")
    add("--resolution", type=number(int, 16),
        help="Cut pictures to their central square and resize it to this side, in pixels. "
             "(pictures stay whole)")
    add("--batch_size", type=number(int, 1), default=1, help="Pictures of one size purified together. (1)")
    add("--seed", type=int, default=0, help="Seed of the noise. (0)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no",
        help="Precision of the model. (no)")
    args = parser.parse_args(argv)
    for name, methods in HEEDED_BY.items():
        if getattr(args, name) is not None and args.method not in methods:
            parser.error(f"argument --{name}: {args.method} does not use it, only {', '.join(methods)}")
    if args.method in POCKET and not args.pretrained_model_name_or_path:
        parser.error(f"argument --pretrained_model_name_or_path: {args.method} needs a model; the bundled "
                     f"one's path is printed by: python -m szt_utils.pocket --network {POCKET[args.method]}")
    return args


def load_purifier(args: argparse.Namespace):
    """The purifier as `function(images, generators)`, and all its settings for the record."""
    from szt_utils.jpeg import jpeg_tensor
    from szt_utils.purify import DEFAULTS, advclean, check_strength, pdmpure, pdmpure_if, regen

    if args.method == "advclean":
        return lambda images, generators: advclean(images), DEFAULTS["advclean"]
    if args.method == "jpeg":
        quality = args.jpeg_quality or DEFAULTS["jpeg"]["quality"]
        return lambda images, generators: jpeg_tensor(images, quality), dict(quality=quality)

    pipeline, kind = load_pipeline(args, args.pretrained_model_name_or_path), args.method
    pipelines = [pipeline]
    if kind == "pdmpure" and type(pipeline).__name__ != "DDPMPipeline":
        if not args.upscaler:
            raise InputError(f"The model '{args.pretrained_model_name_or_path}' is IF's second stage, "
                             "which needs --upscaler, such as stabilityai/stable-diffusion-x4-upscaler.")
        kind, pipelines = "pdmpure_if", [pipeline, load_pipeline(args, args.upscaler, upscaler=True)]
    unused = [name for name in ("guidance_scale", "prompt", "upscaler")
              if kind == "pdmpure" and getattr(args, name) is not None]
    if unused:
        raise InputError(f"The model '{args.pretrained_model_name_or_path}' has no text and no second stage; "
                         f"leave out --{', --'.join(unused)}.")
    settings = {name: value if getattr(args, name, None) is None else getattr(args, name)
                for name, value in DEFAULTS[kind].items()}
    check_strength(settings["strength"], settings["steps"])
    function = {"regen": regen, "pdmpure": pdmpure, "pdmpure_if": pdmpure_if}[kind]
    return functools.partial(purify_with, function, pipelines, settings), settings


def purify_with(function, pipelines: list, settings: dict, images, generators: list):
    """Call a purifier of szt_utils.purify that has a model."""
    return function(images, *pipelines, generators=generators, **settings)


def load_pipeline(args: argparse.Namespace, path: str, upscaler: bool = False):
    """The Diffusers pipeline of a folder or hub name, on the GPU if there is one."""
    import diffusers
    import torch
    from safetensors import SafetensorError

    classes = {"regen": diffusers.AutoPipelineForImage2Image,
               "pdmpure": diffusers.IFImg2ImgSuperResolutionPipeline}
    cls = diffusers.StableDiffusionUpscalePipeline if upscaler else classes[args.method]
    if args.method == "pdmpure" and is_ddpm(path):
        cls = diffusers.DDPMPipeline
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    # What is filtered for would blank or mark the results: neither is wanted of a purifier.
    without = {} if cls is diffusers.DDPMPipeline else dict(safety_checker=None)
    without |= dict(watermarker=None) if cls is diffusers.IFImg2ImgSuperResolutionPipeline else {}
    named = {name: value for name, value in dict(revision=args.revision, variant=args.variant).items()
             if value is not None and not upscaler}
    try:
        pipeline = cls.from_pretrained(path, torch_dtype=dtype, **without, **named)
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"The model '{path}' cannot be loaded as a {cls.__name__}: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def is_ddpm(path: str) -> bool:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(path).get("_class_name") == "DDPMPipeline"
    except (OSError, ValueError) as error:
        raise InputError(f"The model '{path}' cannot be loaded: {str(error).splitlines()[0]}") from None


def read_picture(path: Path, args: argparse.Namespace):
    """A picture as it is purified, float32 (1, 3, H, W) in [0, 1]."""
    from szt_utils.images import crop_and_resize, from_pil, read_image

    image = read_image(path)
    return from_pil(crop_and_resize(image, args.resolution, center_crop=True) if args.resolution else image)


def sha256(image) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def run(args: argparse.Namespace) -> None:
    from szt_utils.images import name_results
    from szt_utils.records import append_stats, open_run, provenance, write_json

    output_dir, image_dir = Path(args.output_dir), Path(args.image_dir)
    arguments = {name: value for name, value in vars(args).items() if name != "output_dir"}
    finished = {record["file"]: record["sha256"]
                for record in open_run(output_dir, Path(__file__).name, arguments, image_dir)
                if (output_dir / record["file"]).exists()}
    # Every file is read once before any work: what cannot be used must not stop a run half-way.
    pictures, work = name_results(image_dir), {}
    for name, path in pictures.items():
        image = read_picture(path, args)
        if finished.get(name) != sha256(image):
            work.setdefault(image.shape, []).append((name, path))
    count = sum(map(len, work.values()))
    print(f"{len(pictures)} pictures in '{image_dir}', {count} of them to do.")
    if not work:
        return

    from tqdm.auto import tqdm

    purifier, settings = load_purifier(args)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "options.json", {"script": Path(__file__).name, "arguments": arguments,
                                             "settings": settings, **provenance()})
    with tqdm(total=count, unit="picture", desc=args.method) as progress:
        for same_size in work.values():
            for i in range(0, len(same_size), args.batch_size):
                batch = same_size[i:i + args.batch_size]
                append_stats(output_dir / "stats.jsonl", purify(args, purifier, batch, output_dir))
                progress.update(len(batch))


def purify(args: argparse.Namespace, purifier, batch: list[tuple[str, Path]], output_dir: Path) -> list[dict]:
    """Purify pictures of one size together, save them, and return their records."""
    import torch

    from szt_utils.images import save_png, to_pil
    from szt_utils.objectives import image_generator

    start = time.perf_counter()
    images = [read_picture(path, args) for _, path in batch]
    results = purifier(torch.cat(images), [image_generator(image[0], args.seed) for image in images])
    if not torch.isfinite(results).all():
        raise InputError(f"The model made no picture of '{batch[0][1]}' but NaN; try --mixed_precision no.")
    records = []
    for (name, path), image, result, picture in zip(batch, images, results, to_pil(results), strict=True):
        save_png(picture, output_dir / name)
        change = (result - image[0]).square().mean().sqrt().item() * 255
        records.append(dict(file=name, source=path.name, sha256=sha256(image), rms_change=round(change, 3)))
    seconds = round((time.perf_counter() - start) / len(batch), 3)
    return [{**record, "seconds": seconds} for record in records]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        run(args)


if __name__ == "__main__":
    main()

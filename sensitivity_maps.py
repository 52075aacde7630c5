"""Where and when the words of a prompt act on a picture: semantic sensitivity maps (paper Sec. 4.1, Eq. 6).

    python sensitivity_maps.py --pretrained_model_name_or_path MODEL --image dog.png \
        --prompt "a puppy wearing a hat" --tokens puppy hat --timesteps 100 300 500 700 900 --output_dir maps

writes `maps.safetensors` - `ssm` (tokens, timesteps, h, w) on the latent grid, and `cross_attention` with
--cross_attention, both axes' labels in its metadata - and `grid.png`, the maps over the picture. Several
pictures get a folder each. Stable Diffusion and SDXL models; --embeddings loads learned words.

    python sensitivity_maps.py --pretrained_model_name_or_path MODEL --diagnose pictures \
        --clean_dir known-clean-pictures --output_dir diagnosis

tells for every picture of a folder how unlike clean ones it is, in `diagnosis.json`. What clean pictures look
like goes to `calibration.json`, for --calibration. The bundled pocket model has one built in.

The same command again goes on where it was stopped.
"""

import argparse
import hashlib
import json
from pathlib import Path

from szt_utils.arguments import number
from szt_utils.errors import InputError, exit_on_input_error

MAPS_ONLY = ("prompt", "tokens", "embeddings", "cross_attention")
DIAGNOSIS_ONLY = ("clean_dir", "calibration")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="Stable Diffusion or SDXL in Diffusers format: folder or hub name.")
    add("--revision", help="Revision of the model on the hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--output_dir", required=True, help="Folder for the results, options.json and stats.jsonl.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", nargs="+", help="Pictures to make maps of.")
    what.add_argument("--diagnose", metavar="IMAGE_DIR", help="Folder of pictures: are they poisoned?")

    maps = parser.add_argument_group("Maps")
    maps.add_argument("--prompt", help="What is said about the pictures.")
    maps.add_argument("--tokens", nargs="+",
                      help="Words of the prompt, or <|startoftext|>; a word that occurs more than once "
                           "counts as a whole. (every word)")
    maps.add_argument("--timesteps", type=number(int, 0), nargs="+", default=[100, 300, 500, 700, 900],
                      help="Timesteps of the maps. (100 300 500 700 900)")
    maps.add_argument("--replacements", type=number(int, 1), default=16,
                      help="Random words in place of a token, in one U-Net batch. (16)")
    maps.add_argument("--noise_draws", type=number(int, 1), default=1,
                      help="Draws of noise to average over. (1)")
    maps.add_argument("--embeddings", nargs="+",
                      help="Learned embeddings, whose words the prompt may use: .safetensors or .bin; for "
                           "SDXL .safetensors with clip_l and clip_g, and the word is <file name>.")
    maps.add_argument("--cross_attention", action="store_true", help="Cross-attention maps as well.")
    maps.add_argument("--batch_size", type=number(int, 1),
                      help="Most samples in a U-Net batch. (replacements + 1)")

    diagnosis = parser.add_argument_group("Diagnosis")
    diagnosis.add_argument("--clean_dir",
                           help="Folder of clean pictures to calibrate on, with its sub-folders: 10 or more, "
                                "as like the others as can be.")
    diagnosis.add_argument("--calibration", help="A calibration.json of an earlier run, in their place.")

    add("--resolution", type=number(int, 8),
        help="Side of the pictures, their central square, in pixels. (the model's own)")
    add("--seed", type=number(int, 0), default=0, help="Seed of noise and replacements. (0)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no",
        help="Precision of the model. (no)")
    args = parser.parse_args(argv)

    for name in DIAGNOSIS_ONLY if args.image else MAPS_ONLY:
        if getattr(args, name):
            parser.error(f"argument --{name}: not used with {'--image' if args.image else '--diagnose'}")
    if args.image and not args.prompt:
        parser.error("argument --image: needs --prompt")
    if args.clean_dir and args.calibration:
        parser.error("argument --calibration: not used with --clean_dir")
    return args


def read_square(path: Path, resolution: int):
    """The central square of a picture at the resolution: Pillow image and float32 (1, 3, R, R) in [0, 1]."""
    from szt_utils.images import crop_and_resize, from_pil, read_image

    image = crop_and_resize(read_image(path), resolution, center_crop=True)
    return image, from_pil(image)


def sha256(tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def load_model(args: argparse.Namespace):
    """The model, on the GPU if there is one, and the resolution, checked."""
    import torch

    from szt_utils.sensitivity import PromptedModel

    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    model = PromptedModel.load(args.pretrained_model_name_or_path, revision=args.revision,
                               variant=args.variant, dtype=dtype,
                               device="cuda" if torch.cuda.is_available() else "cpu")
    cell = 2 ** (len(model.base.vae.config.block_out_channels) - 1)
    resolution = args.resolution or model.base.unet.config.sample_size * cell
    if resolution % cell:
        raise InputError(f"The model needs a --resolution that is a multiple of {cell}, "
                         f"but it is {resolution}.")
    return model, resolution


def spelled_out(text: str, learned: list[tuple[str, int]]) -> str:
    """The text with all vectors of every learned word, <c> <c>_1, in its place."""
    from szt_utils.embeddings import placeholder_prompt

    words = {token: placeholder_prompt(token, count) for token, count in learned}
    return " ".join(words.get(word, word) for word in text.split())


def make_maps(args: argparse.Namespace, records: list[dict]) -> None:
    from szt_utils.images import read_image
    from szt_utils.records import append_stats

    folders = [Path(args.output_dir)] if len(args.image) == 1 else [
        Path(args.output_dir) / Path(image).stem for image in args.image]
    for image, folder in zip(args.image, folders, strict=True):
        if folders.count(folder) > 1:
            raise InputError(f"Several pictures are called '{Path(image).stem}'; rename them.")
        read_image(image)  # what cannot be read must not stop the run half-way
    model, resolution = load_model(args)
    last = model.base.scheduler.config.num_train_timesteps - 1
    if bad := [t for t in args.timesteps if t > last]:
        raise InputError(f"The timestep {bad[0]} of --timesteps is above the model's last, {last}.")
    learned = [model.add_embedding(path) for path in args.embeddings or []]
    words = args.tokens and [spelled_out(word, learned) for word in args.tokens]
    prompt = model.tokenize(spelled_out(args.prompt, learned), words)
    labels = args.tokens or prompt.words

    from tqdm.auto import tqdm

    finished = {record["image"]: record["sha256"] for record in records}
    with tqdm(list(zip(args.image, folders, strict=True)), desc="maps", unit="picture") as progress:
        for path, folder in progress:
            image, pixels = read_square(path, resolution)
            if finished.get(path) == sha256(pixels) and (folder / "grid.png").exists():
                continue
            maps = maps_of(args, model, prompt, pixels)
            save_maps(args, folder, image, maps, labels)
            append_stats(Path(args.output_dir) / "stats.jsonl", [
                {"image": path, "sha256": sha256(pixels), "token": token, "timestep": t,
                 **{name: of_kind[i, j].mean().item() for name, of_kind in maps.items()}}
                for i, token in enumerate(labels) for j, t in enumerate(args.timesteps)])


def maps_of(args: argparse.Namespace, model, prompt, pixels) -> dict:
    """Float32 (tokens, timesteps, h, w) by name; the draws are the same for every picture of a size."""
    import torch

    from szt_utils.sensitivity import cross_attention_maps, draw_replacements, semantic_sensitivity

    with torch.no_grad():
        latents = model.base.encode(pixels)
    generator = torch.Generator().manual_seed(args.seed)
    replaced, drawn = draw_replacements(prompt, args.replacements, model.vocabulary_size, generator)
    noise = torch.randn((args.noise_draws, *latents.shape[1:]), generator=generator)
    maps = {"ssm": semantic_sensitivity(model, latents, prompt, args.timesteps, noise=noise,
                                        replaced=replaced, drawn=drawn, batch_size=args.batch_size)}
    if args.cross_attention:
        maps["cross_attention"] = cross_attention_maps(model, latents, prompt, args.timesteps, noise=noise)
    maps = {name: of_kind.float().cpu().contiguous() for name, of_kind in maps.items()}
    if not all(of_kind.isfinite().all() for of_kind in maps.values()):
        raise InputError("The maps are not finite; use --mixed_precision bf16 or no instead of fp16.")
    return maps


def save_maps(args: argparse.Namespace, folder: Path, image, maps: dict, labels: list[str]) -> None:
    import numpy as np
    from safetensors.torch import save

    from szt_utils.plots import map_grid
    from szt_utils.records import write_bytes

    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "maps.safetensors", save(maps, metadata={
        "tokens": json.dumps(labels), "timesteps": json.dumps(args.timesteps), "prompt": args.prompt}))
    titles = {"ssm": "", "cross_attention": "\nattention"}
    map_grid(folder / "grid.png", image, np.concatenate([of_kind.numpy() for of_kind in maps.values()]),
             [f"{label}{titles[name]}" for name in maps for label in labels], args.timesteps, args.prompt)


def find_calibration(args: argparse.Namespace) -> Path | None:
    """The calibration file to use, None with --clean_dir; InputError when there is none for the model."""
    from szt_utils import pocket

    if args.clean_dir or args.calibration:
        return Path(args.calibration) if args.calibration else None
    if Path(args.pretrained_model_name_or_path).resolve() == Path(pocket.model_path()).resolve():
        return Path(pocket.calibration_path())
    raise InputError("--diagnose needs --clean_dir, a folder of clean pictures, or the --calibration of an "
                     "earlier run: only the pocket model has one built in.")


def diagnose(args: argparse.Namespace, records: list[dict]) -> None:
    from szt_utils.diagnosis import calibrate, read_calibration
    from szt_utils.images import list_images
    from szt_utils.records import write_json

    calibration = find_calibration(args)
    calibration = calibration and read_calibration(calibration)
    root = Path(args.diagnose)
    clean = list_images(args.clean_dir, recursive=True) if args.clean_dir else []
    paths = list_images(root, recursive=True)
    rows = signals_of(args, [*clean, *paths], records)
    if calibration is None:
        calibration = calibrate([rows[path] for path in clean])
        write_json(Path(args.output_dir) / "calibration.json", calibration)
    report = verdict(calibration, {path.relative_to(root).as_posix(): rows[path] for path in paths})
    write_json(Path(args.output_dir) / "diagnosis.json", report)
    for name, picture in report["pictures"].items():
        print(f"{name}: {picture['sentence']}")
    print(report["sentence"])


def signals_of(args: argparse.Namespace, paths: list[Path], records: list[dict]) -> dict[Path, list[float]]:
    """The signals of every picture; those in the records are not computed again."""
    from szt_utils.diagnosis import SIGNALS, signals
    from szt_utils.images import read_image
    from szt_utils.records import append_stats

    for path in paths:
        read_image(path)
    from tqdm.auto import tqdm

    model, resolution = load_model(args)
    if model.second_text_encoder is not None:
        raise InputError("--diagnose works with Stable Diffusion models, but this is an SDXL model.")
    known = {record["sha256"]: [record[name] for name in SIGNALS] for record in records}
    rows = {}
    for path in tqdm(paths, desc="signals", unit="picture"):
        _, pixels = read_square(path, resolution)
        if (key := sha256(pixels)) not in known:
            known[key] = signals(model.base, pixels, seed=args.seed)
            append_stats(Path(args.output_dir) / "stats.jsonl", [
                {"file": str(path), "sha256": key, **dict(zip(SIGNALS, known[key], strict=True))}])
        rows[path] = known[key]
    return rows


def verdict(calibration: dict, rows: dict[str, list[float]]) -> dict:
    """What diagnosis.json holds: every picture's score and sentence, and a sentence about the set."""
    from szt_utils.diagnosis import LEVEL, explain

    pictures = {name: {**explain(calibration, row),
                       "signals": dict(zip(calibration["signals"], row, strict=True))}
                for name, row in rows.items()}
    suspects = sum(picture["suspect"] for picture in pictures.values())
    expected = (1 - LEVEL) * len(pictures)
    poisoned = suspects >= max(2 * expected + 1, 0.2 * len(pictures))
    return {"poisoned": bool(poisoned), "suspects": suspects, "pictures": pictures, "sentence": (
        f"{suspects} of {len(pictures)} pictures look poisoned (of clean ones, about {expected:.1f} would): "
        + ("this set is probably poisoned." if poisoned else "this set is probably clean."))}


def run(args: argparse.Namespace) -> None:
    from szt_utils.records import open_run, provenance, write_json

    output_dir, script = Path(args.output_dir), Path(__file__).name
    arguments = {name: value for name, value in vars(args).items() if name != "output_dir"}
    if args.diagnose and output_dir.resolve().is_relative_to(Path(args.diagnose).resolve()):
        raise InputError(f"--output_dir '{output_dir}' is the folder of --diagnose or lies in it; "
                         "give another --output_dir.")
    records = open_run(output_dir, script, arguments)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "options.json", {"script": script, "arguments": arguments, **provenance()})
    (make_maps if args.image else diagnose)(args, records)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        run(args)


if __name__ == "__main__":
    main()

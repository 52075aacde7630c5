"""Score a learned embedding (paper Sec. 5.1.3): generate a set of prompts, then compare the pictures with the
clean ones and with their prompts.

    python evaluate.py --pretrained_model_name_or_path MODEL --embeddings my-toy --real_dir pictures \
        --class_word toy --dino facebook/dinov2-base --clip openai/clip-vit-large-patch14

Without a model and networks the bundled pocket ones are taken. Writes the pictures, `scores.json` and
`contact_sheet.png`. The same command again generates only what is missing.
"""

import argparse
import hashlib
import warnings
from pathlib import Path

from szt_utils.arguments import number
from szt_utils.errors import InputError, exit_on_input_error

METRICS = ("dino", "fid", "kid", "fd_dino", "clip")  # szt_utils.metrics.METRICS; --help need not import torch
SAMPLING = {True: (25, 5.0), False: (25, 7.5)}  # steps and guidance, of the pocket model and of another one


def metric_list(text: str) -> list[str]:
    """An argparse type: names of metrics with commas between."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"unknown metric '{unknown[0]}'; choose from: {', '.join(METRICS)}")
    return names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path",
        help="Stable Diffusion in Diffusers format: folder or hub name. (the bundled pocket model)")
    add("--revision", help="Revision of the model on the hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--embeddings", required=True,
        help="The learned embedding: its file or the training's output folder.")
    add("--real_dir", required=True, help="Folder of the clean pictures of the concept.")
    add("--output_dir", required=True,
        help="Folder for images/, scores.json, contact_sheet.png, options.json.")
    add("--prompts_file",
        help="Prompts, one a line, with {} for the concept. "
             "(24 of our own; for the pocket model its 8 backgrounds)")
    add("--images_per_prompt", type=number(int, 1), default=5, help="Pictures of each prompt. (5)")
    add("--class_word", default="object",
        help="What stands for the concept in the prompts of the CLIP score. (object)")
    add("--metrics", type=metric_list, default=list(METRICS), metavar="NAME,...",
        help=f"Some of {','.join(METRICS)}. (all)")
    add("--dino", help="Image encoder in Dinov2Model format: folder or hub name. (the bundled pocket one)")
    add("--clip", help="CLIPModel: folder or hub name. (the bundled pocket one)")
    add("--inception",
        help="InceptionV3 weights for FID and KID, the file of torch-fidelity. (features of --clip instead)")
    add("--num_inference_steps", type=number(int, 1), help="Denoising steps, DPM-Solver++. (25)")
    add("--guidance_scale", type=number(float, 0, above=True),
        help="Classifier-free guidance. (7.5, pocket model 5)")
    add("--batch_size", type=number(int, 1), default=8, help="Pictures generated together. (8)")
    add("--seed", type=int, default=100, help="The i-th picture starts from noise of seed + i. (100)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no",
        help="Precision of the model. (no)")
    args = parser.parse_args(argv)
    args.pocket = args.pretrained_model_name_or_path is None
    steps, guidance = SAMPLING[args.pocket]
    args.num_inference_steps = args.num_inference_steps or steps
    args.guidance_scale = args.guidance_scale or guidance
    return args


def find_embedding(path: str) -> Path:
    """The embedding's file, also when its folder is given."""
    path = Path(path)
    file = path / "learned_embeds.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"The embedding '{file}' does not exist; "
                         "give its file or the training's output folder.")
    return file


def run(args: argparse.Namespace) -> None:
    import torch

    from szt_utils import pocket
    from szt_utils.captions import EVALUATION_PROMPTS, read_prompts
    from szt_utils.images import contact_sheet, list_images, read_image, save_png
    from szt_utils.metrics import Networks, evaluate_embedding
    from szt_utils.records import open_run, provenance, write_json

    output_dir, embedding = Path(args.output_dir), find_embedding(args.embeddings)
    if output_dir.resolve().is_relative_to(Path(args.real_dir).resolve()):
        raise InputError(f"--output_dir '{output_dir}' is --real_dir or lies in it; "
                         "give another --output_dir.")
    prompts = list(read_prompts(args.prompts_file) if args.prompts_file
                   else pocket.PROMPTS if args.pocket else EVALUATION_PROMPTS)
    # What decides the pictures; metrics and networks may change from run to run.
    arguments = {name: getattr(args, name) for name in (
        "pretrained_model_name_or_path", "revision", "variant", "images_per_prompt", "num_inference_steps",
        "guidance_scale", "seed", "mixed_precision")}
    arguments |= {"embeddings": hashlib.sha256(embedding.read_bytes()).hexdigest(), "prompts_file": prompts}
    open_run(output_dir, Path(__file__).name, arguments)
    real = [read_image(path) for path in list_images(args.real_dir)]
    networks = Networks(args.dino or pocket.dino_path(), args.clip or pocket.clip_path(), args.inception)
    output_dir.mkdir(parents=True, exist_ok=True)
    options = {"script": Path(__file__).name, "arguments": {**vars(args), **arguments}, **provenance()}
    write_json(output_dir / "options.json", options)

    messages = []
    if not args.pocket and not (args.dino and args.clip):
        messages.append("The bundled networks know the pocket world alone; "
                        "give --dino and --clip for photos.")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        generated, scores = evaluate_embedding(
            args.pretrained_model_name_or_path or pocket.model_path(), embedding, real, prompts, networks,
            images_per_prompt=args.images_per_prompt, class_word=args.class_word, metrics=args.metrics,
            seed=args.seed, folder=output_dir / "images",
            device="cuda" if torch.cuda.is_available() else "cpu",
            pipeline_options=dict(revision=args.revision, variant=args.variant, torch_dtype=dtype),
            steps=args.num_inference_steps, guidance_scale=args.guidance_scale, batch_size=args.batch_size,
            progress=True)
    messages += [str(message.message) for message in caught if message.category is UserWarning]
    write_json(output_dir / "scores.json", {
        "metrics": scores, "generated": len(generated), "real": len(real), "dino": args.dino or "pocket",
        "clip": args.clip or "pocket", "inception": args.inception, "class_word": args.class_word,
        "warnings": messages})
    count = args.images_per_prompt
    rows = [("the real pictures", real)] + [(prompt.format("<concept>"), generated[i * count:(i + 1) * count])
                                            for i, prompt in enumerate(prompts)]
    save_png(contact_sheet(rows), output_dir / "contact_sheet.png")
    for message in dict.fromkeys(messages):
        print(f"warning: {message}")
    print(f"{len(generated)} generated pictures, {len(real)} real ones")
    for name, value in scores.items():
        print(f"  {name:10s} {value:.4f}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        run(args)


if __name__ == "__main__":
    main()

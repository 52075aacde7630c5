"""Command lines: number types, the flags that several scripts share, and command lines made of flags.

It imports nothing heavy, so that `--help` and usage errors come at once.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import InputError, printable

__all__ = ["EntryParser", "add_data_flags", "add_diffusers_flags", "add_family_flags", "add_memory_flags",
           "add_model_flags", "add_safe_zone_flags", "check_training_flags", "command_line",
           "given_flags", "number", "refuse_unused", "refuse_without", "script_parser", "seed", "unmet_needs",
           "user_path"]

LARGEST = {int: 2**31 - 1, float: 1e36}  # what torch takes; float32 ends a little above 1e36


def number(kind: type, lowest: float, highest: float | None = None, *, above: bool = False,
           below: bool = False, unit: str = "") -> Callable[[str], float]:
    """An argparse type: a finite `int` or `float` in [lowest, highest].

    `above` and `below` exclude the lower and the upper end; `unit` says what is counted, as in " of 1/255
    levels".
    """
    def convert(text: str) -> float:
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a {'whole ' * (kind is int)}number{unit}") from None
        too_low = value < lowest or (above and value == lowest)
        if too_low or (highest is not None and (value > highest or (below and value == highest))):
            least = f"above {lowest:g}" if above else f"at least {lowest:g}"
            top = str(highest) if kind is int else f"{highest or 0:g}"
            most = "" if highest is None else f" and {'below' if below else 'at most'} {top}"
            raise argparse.ArgumentTypeError(f"{text} is not {least}{most}")
        if highest is None and abs(value) > LARGEST[kind]:
            raise argparse.ArgumentTypeError(f"{text} is too large; the most is {LARGEST[kind]}")
        return value
    return convert


seed = number(int, 0, 2**32 - 1)  # what numpy takes


def user_path(text: str) -> str:
    """An argparse type: a path, whose leading `~` is expanded, or an id on the Hub."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"'{printable(text)}' is not a path")
    path = os.path.expanduser(text)
    shorter = path.rstrip("/")  # a shell completes a folder with a slash
    return path if not shorter or shorter.endswith(":") else shorter  # the root, also of a drive


def local_path(text: str) -> Path:
    """An argparse type: `user_path` as a Path."""
    return Path(user_path(text))


class _ScriptParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _ShowTraceback(argparse.Action):
    def __call__(self, *_: Any) -> None:
        os.environ["SZT_TRACEBACK"] = "1"  # also for the processes that a script starts


class _LimitPixels(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        os.environ["SZT_MAX_IMAGE_PIXELS"] = str(values)  # szt_utils.images reads it


class EntryParser(argparse.ArgumentParser):
    """A parser of one entry of a file: an InputError, which names the entry by `prog`, for usage errors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}.")


def script_parser(doc: str, parser: type[argparse.ArgumentParser] = _ScriptParser,
                  **options: Any) -> argparse.ArgumentParser:
    """A parser whose help begins with the script's docstring as it is, not with a list of all flags.

    From here on, what a terminal's encoding lacks is printed as an escape: printing raises no error. The
    model libraries print errors only, unless their environment variables say otherwise.
    """
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of library authors to each other
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    made = parser(description=doc, usage="%(prog)s [flags]",
                  epilog="A value in parentheses at the end of a flag's help is its default.",
                  formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    made.add_argument("--traceback", action=_ShowTraceback, nargs=0, dest=argparse.SUPPRESS,
                      help="Show the traceback of an unexpected error.")
    made.add_argument("--max_image_pixels", action=_LimitPixels, type=number(int, 1, 10**10), metavar="N",
                      dest=argparse.SUPPRESS,
                      help="Refuse images of more pixels, which may need more memory than there is. "
                           "(67108864, such as 8192 x 8192)")
    return made


def command_line(**flags: Any) -> list[str]:
    """The command line of flags by name.

    None and False are left out, True is a flag without a value, a list or tuple is one with several.
    """
    arguments = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [] if value is True else [value]
            arguments += [f"--{name}", *map(str, values)]
    return arguments


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that have a value; the settings of the others are the library's defaults."""
    return {name: value for name, value in vars(args).items() if value is not None}


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, method: str,
                  used_by: Mapping[str, Sequence[str]]) -> None:
    """End with a usage error for a flag that `method` does not use; `used_by` names the methods that do."""
    for name, methods in used_by.items():
        if getattr(args, name) is not None and method not in methods:
            parser.error(f"argument --{name}: {method} does not use it, only {', '.join(methods)}")


def refuse_without(parser: argparse.ArgumentParser, args: argparse.Namespace, needed: str, is_given: object,
                   *names: str) -> None:
    """End with a usage error for each of the given flags `names` if the flag `needed` is not given."""
    for name in _without(args, is_given, names):
        parser.error(f"argument --{name}: needs {needed}")


def unmet_needs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The flags of `add_safe_zone_flags` that are given without another one that they need, and that one."""
    for needed, is_given, names in (
            ("--loss_mask_dir", args.loss_mask_dir, ("mask_dilation", "mask_mode", "mask_normalization")),
            ("--t_distribution power", args.t_distribution == "power", ("t_power",)),
            ("--t_distribution tanh", args.t_distribution == "tanh", ("t_center", "t_width"))):
        yield from ((name, needed) for name in _without(args, is_given, names))


def _without(args: argparse.Namespace, is_given: object, names: Sequence[str]) -> list[str]:
    """Those of the flags `names` that are given although the flag that they need is not."""
    values = {} if is_given else {name: getattr(args, name) for name in names}
    return [name for name, value in values.items() if value is not None and value is not False]  # 0 counts


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of captions and of data sets of the datasets library."""
    add = parser.add_argument_group("Data sets and captions").add_argument
    add("--caption_mode", choices=["template", "file", "both"],
        help="captions from templates, from '<stem>.txt' beside each image or the folder's metadata.jsonl, "
             "or from both by chance; {} or the initializer token is the placeholder's place (default: "
             "template)")
    add("--dataset_name", type=user_path,
        help="instead of --train_data_dir, a data set of the datasets library: an id on the Hub or a folder")
    add("--dataset_config_name", help="configuration of the data set")
    add("--image_column", help="column with its images (default: image)")
    add("--caption_column", help="column with its captions, for --caption_mode file or both")


def check_training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, whole: bool) -> None:
    """End with a usage error for flags of a training that do not go together, or are missing.

    With `whole`, only for those that all concepts of a file of --concepts share.
    """
    if whole:
        for name, clash, remedy in (("num_train_epochs", args.num_train_epochs and not args.max_train_steps,
                                     "; give --max_train_steps"),
                                    ("dataset_name", args.dataset_name, "; give each its train_data_dir"),
                                    ("hub_model_id", args.hub_model_id, ""),
                                    ("validation_epochs", args.validation_epochs, "")):
            if clash:
                parser.error(f"argument --{name}: differs between concepts, so --concepts cannot use it"
                             f"{remedy}")
        return
    if args.dataset_name and args.train_data_dir:
        parser.error("argument --dataset_name: cannot be combined with --train_data_dir")
    if missing := [f"--{name}" for name in ("train_data_dir", "placeholder_token", "initializer_token")
                   if getattr(args, name) is None and not (name == "train_data_dir" and args.dataset_name)]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if args.offload and (args.no_cache_latents or args.quantize == "4bit"):
        parser.error("argument --offload: cannot be combined with --no_cache_latents, which needs the VAE at "
                     "every step, or --quantize 4bit, which loads the network onto the GPU")
    if args.t_max is not None and (args.t_min or 0) >= args.t_max:
        parser.error(f"argument --t_min: must be below --t_max, but is {args.t_min or 0}, "
                     f"and --t_max is {args.t_max}")
    for name, needed in unmet_needs(args):
        parser.error(f"argument --{name}: needs {needed}")
    refuse_without(parser, args, "--dataset_name", args.dataset_name,
                   "dataset_config_name", "image_column", "caption_column")
    refuse_without(parser, args, "--caption_mode file or both", args.caption_mode in ("file", "both"),
                   "caption_column")
    if args.dataset_name and args.caption_mode in ("file", "both") and not args.caption_column:
        parser.error(f"argument --caption_mode: {args.caption_mode} needs --caption_column with "
                     "--dataset_name")


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a training's speed and memory."""
    add = parser.add_argument_group("Speed and memory").add_argument
    add("--compile", action="store_true", help="torch.compile the networks: a slow start, then faster steps")
    add("--quantize", choices=["8bit", "4bit"],
        help="hold the frozen U-Net or transformer in fewer bits: int8 by torchao, or NF4 by bitsandbytes, "
             "which needs a GPU")
    add("--offload", action="store_true",
        help="keep the VAE, T5 and the network in CPU memory until it is their turn on the GPU")
    add("--no_cache_latents", action="store_true",
        help="encode the images at every step instead of once; same result, slower, needs no cache")
    add("--latent_cache_gb", type=number(float, 0), default=4,
        help="a concept's larger cache is a file in its output folder (default: 4)")


def add_model_flags(parser: argparse._ActionsContainer, model: str, required: bool = True) -> None:
    """The flags of a script that loads a model; `model` is the help of its path.

    None of them has a default unless the model is `required`.
    """
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=required, type=user_path, help=model)
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no" if required else None,
        help="Precision of the model. (no)")


def add_safe_zone_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a `SafeZone`, all without a default, and of its masks, as the first group of the help."""
    group = parser.add_argument_group("Safe-Zone Training")
    add = group.add_argument
    add("--szt", action="store_true",
        help="use the paper's value for each of these flags that is not set: --jpeg_quality 25, --t_min at "
             "the signal-to-noise ratio 0.382 (500 of 1000 for Stable Diffusion), --mask_dilation 16 (at "
             "512 px, scaled with --resolution)")
    add("--jpeg_quality", type=number(int, 1, 100),
        help="JPEG quality, 1 to 100, at the training resolution (default: no JPEG)")
    add("--t_min", type=number(int, 0), help="lowest timestep to train at, inclusive (default: 0)")
    add("--t_max", type=number(int, 1), help="end of the timesteps, exclusive (default: the model's, 1000)")
    add("--loss_mask_dir", type=user_path,
        help="folder of masks, <image's stem>.png, same size, white = the concept")
    add("--mask_dilation", type=number(int, 0),
        help="grow the masks by this many pixels at the training resolution (default: 0)")
    add("--mask_mode", choices=["loss", "image", "latent", "image_and_loss", "none"],
        help="what the mask multiplies (Sec. 5.2.3): the loss, the image (around mid-grey), the noised "
             "latent, the image and the loss, or nothing: then stats.jsonl only records the loss inside and "
             "outside (default: loss)")
    add("--mask_normalization", choices=["none", "area"],
        help="mean of the masked loss over all elements, as in Eq. 7, or over the mask (default: none)")
    add("--t_distribution", choices=["uniform", "power", "tanh"],
        help="how timesteps are drawn from [t_min, t_max) (default: uniform)")
    add("--t_power", type=number(float, -math.inf),
        help="exponent k of the power distribution, p(t) ~ (t / T)^k (default: 1)")
    add("--t_center", type=number(float, -math.inf),
        help="center of p(t) ~ 1 + tanh((t - center) / width) (default: 500)")
    add("--t_width", type=number(float, -math.inf), help="width of the tanh distribution (default: 100)")


def add_family_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a training that concern some model families only."""
    add = parser.add_argument_group("Model families").add_argument
    add("--clip_skip", type=number(int, 0), default=0,
        help="last layers of the text encoders to skip, as in Diffusers: of Stable Diffusion 1 and 2, 1 is "
             "what A1111 and kohya call 2; for SDXL and Stable Diffusion 3 leave it at 0 (default: 0)")
    add("--pooled_token", choices=["upstream", "end"], default="upstream",
        help="SDXL: the token that the second text encoder pools: that of transformers, which may be the "
             "placeholder, or the end of the text, as in ComfyUI, A1111 and kohya (default: upstream)")
    add("--micro_conditioning", choices=["crop", "upstream"], default="crop",
        help="SDXL with --center_crop: the crop in the size conditioning: the real one, or (0, 0) as in the "
             "Diffusers example (default: crop)")
    add("--snr_gamma", type=number(float, 0, above=True),
        help="weight the loss by the signal-to-noise ratio, at most this (Min-SNR; 5 is usual): with "
             "velocities it is then that of noise prediction at high timesteps (default: the plain loss)")


def add_diffusers_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the Diffusers examples `textual_inversion.py` and `_sdxl.py`, with their defaults."""
    add = parser.add_argument_group("As in the Diffusers example").add_argument
    count = number(int, 1)
    add("--pretrained_model_name_or_path", required=True, type=user_path,
        help="Diffusers folder, or id on the Hub")
    add("--revision", help="revision of the model on the Hub")
    add("--variant", help="variant of the model files, e.g. fp16")
    add("--tokenizer_name", type=user_path, help="another tokenizer's folder or id, if it is not the model's")
    add("--train_data_dir", type=user_path, help="folder of the training images (required)")
    add("--placeholder_token", help="the new word for the concept, e.g. <my-concept> (required)")
    add("--initializer_token", help="one word near the concept, whose embedding is the start (required)")
    add("--learnable_property", choices=["object", "style"], default="object",
        help="which captions to train with (default: object)")
    add("--repeats", type=count, default=100, help="how often an epoch shows each image (default: 100)")
    add("--num_vectors", type=count, default=1,
        help="number of embedding vectors for the concept (default: 1)")
    add("--output_dir", default="text-inversion-model", type=user_path,
        help="where embeddings and checkpoints go (default: text-inversion-model)")
    add("--seed", type=seed, help="seed of all random draws (default: a new one, recorded in options.json)")
    add("--resolution", type=count, default=512,
        help="images are resized to a square of this many pixels (default: 512)")
    add("--center_crop", action="store_true", help="cut out the central square before resizing")
    add("--train_batch_size", type=count, default=16, help="images per step and process (default: 16)")
    add("--num_train_epochs", type=count,
        help="number of epochs; takes effect only without --max_train_steps")
    add("--max_train_steps", type=count, help="number of optimizer steps (default: 5000)")
    add("--gradient_accumulation_steps", type=count, default=1,
        help="batches per optimizer step (default: 1)")
    add("--gradient_checkpointing", action="store_true", help="less memory, slower backward pass")
    add("--learning_rate", type=number(float, 0), default=1e-4,
        help="learning rate after warmup (default: 1e-4)")
    add("--scale_lr", action="store_true",
        help="multiply the learning rate by processes, accumulation and batch size")
    add("--lr_scheduler", default="constant",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                 "constant_with_warmup"], help="schedule of the learning rate (default: constant)")
    add("--lr_warmup_steps", type=number(int, 0), default=500,
        help="warmup steps of the schedules that have a warmup (default: 500)")
    add("--lr_num_cycles", type=count, default=1, help="cycles of cosine_with_restarts (default: 1)")
    add("--dataloader_num_workers", type=int, default=0,
        help="accepted for compatibility: images are read once, before the training")
    add("--adam_beta1", type=number(float, 0, 1, below=True), default=0.9, help="AdamW's (default: 0.9)")
    add("--adam_beta2", type=number(float, 0, 1, below=True), default=0.999, help="AdamW's (default: 0.999)")
    add("--adam_weight_decay", type=number(float, 0), default=1e-2, help="AdamW's (default: 1e-2)")
    add("--adam_epsilon", type=number(float, 0), default=1e-8, help="AdamW's (default: 1e-8)")
    add("--use_8bit_adam", action="store_true",
        help="accepted for compatibility: it would save nothing for a few rows")
    add("--push_to_hub", action="store_true", help="upload the output folder to the Hub")
    add("--hub_token", help="token for the upload")
    add("--hub_model_id", help="name of the repository to upload to (default: the output folder's name)")
    add("--logging_dir", default="logs", help="TensorBoard folder, inside --output_dir (default: logs)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no",
        help="precision of the frozen networks (default: no)")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on NVIDIA GPUs since Ampere")
    add("--report_to", help="tensorboard, wandb, comet_ml, all, or none (default: tensorboard, if installed)")
    add("--validation_prompt", help="prompt with the placeholder, generated from during the training")
    add("--num_validation_images", type=count, default=4, help="how many images (default: 4)")
    add("--validation_steps", type=count, default=100,
        help="generate validation images every so many steps (default: 100)")
    add("--validation_epochs", type=count, help="deprecated: the same in epochs")
    add("--local_rank", type=int, default=-1, help="set by launchers")
    add("--checkpointing_steps", type=count, default=500,
        help="save a checkpoint to resume from every so many steps, and after the last (default: 500)")
    add("--checkpoints_total_limit", type=count, help="keep only so many checkpoints (default: all)")
    add("--resume_from_checkpoint", type=user_path, help='a folder checkpoint-N of --output_dir, or "latest"')
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="attention by xformers")
    add("--no_safe_serialization", action="store_true", help="write .bin files instead of .safetensors")
    add("--save_steps", type=count, default=500, help="save the embedding every so many steps (default: 500)")
    add("--save_as_full_pipeline", action="store_true",
        help="save the whole pipeline with the new token as well")

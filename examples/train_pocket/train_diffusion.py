"""Train the network of a pocket model on cached latents, and the first model's text encoder with it:

    python examples/train_pocket/train_diffusion.py                                  # the first model
    python examples/train_pocket/train_diffusion.py --family sdxl --lr 1e-3          # grown from it (grow.py)
    python examples/train_pocket/train_diffusion.py --family flow
    python examples/train_pocket/train_diffusion.py --prediction_type v_prediction --lr 1e-3

The first model needs the VAE of train_vae.py in `work_dir/model/vae`. The others grow from `--start_from`, or
train it further when it is of their own family. The whole model, in Diffusers format, is written to
`work_dir/model`, `model-sdxl`, `model-flow` or `model-v`.
"""

import argparse
import contextlib
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import grow
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from recipe import TRAINING_SEEDS, Average, Muon, pixels, scenes, train, training_parser
from torch.utils.data import DataLoader, Dataset

from szt_utils import pocket
from szt_utils.images import to_vae_range
from szt_utils.models import Model, load_model, residual
from szt_utils.models.flow import Flow
from szt_utils.models.stable_diffusion import StableDiffusion
from szt_utils.pocket.scenes import BACKGROUNDS, COLORS, PATTERNS, SHAPES, Attributes
from szt_utils.pocket.vocabulary import END_OF_WORD, OBJECT_WORD, pocket_tokenizer, training_caption


@torch.no_grad()
def cached_latents(vae, images, path: Path, device) -> torch.Tensor:
    """Scaled posterior means of the images, every second one mirrored, float16 (N, 4, 16, 16).

    They are encoded once, and later read from `path`.
    """
    if not path.exists():
        batches = []
        for start in range(0, len(images), 100):
            x = to_vae_range(pixels(images[start:start + 100], device))
            x[1::2] = x[1::2].flip(3)
            batches.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().cpu())
            print(f"encoded {start + len(x)} of {len(images)}", end="\r", flush=True)
        torch.save(torch.cat(batches), path)
    return torch.load(path, weights_only=True)


def blended(attributes, rng) -> tuple[str, list[tuple[float, str, str]]]:
    """A training caption, and what to add to its words' embeddings: (weight, word to add, word to change).

    With plain word embeddings, a text encoder of a few hundred words learns a switch: between two words the
    output changes at once, and textual inversion finds no slope. So some words are blends of the true word
    and another of its kind, where a share is the probability that the word is true. And some captions put all
    attributes into one word, as the sum of theirs, because a learned token must do that.
    """
    caption, changes = training_caption(attributes, rng), []
    spoken = caption.split()
    fused = OBJECT_WORD not in spoken and attributes.shape in spoken and rng.random() < 0.5
    if fused:
        caption = " ".join(OBJECT_WORD if word == attributes.shape else word for word in spoken
                           if word not in (attributes.color, attributes.pattern))
        changes.append((-rng.uniform(0, 1), OBJECT_WORD, OBJECT_WORD))
    for kind, true in ((COLORS, attributes.color), (PATTERNS, attributes.pattern),
                       (SHAPES, attributes.shape), (BACKGROUNDS, attributes.background)):
        if true not in spoken:
            continue
        # Drawn in proportion to 1 - share: by Bayes' rule that is the chance that the word is true.
        share = 1 - rng.random() ** 0.5 if rng.random() < 0.4 else 0.0
        other = str(rng.choice(list(kind)))
        into_object = fused and kind is not BACKGROUNDS
        place, size = (OBJECT_WORD, rng.uniform(0.3, 1.3)) if into_object else (true, 1.0)
        changes += [(size * (1 - share) - (not into_object), true, place), (size * share, other, place)]
    return caption, changes


class Captions(NamedTuple):
    """Token ids (B, L) of `blended` captions, and the N changes of the embeddings of their words."""

    ids: torch.Tensor
    places: torch.Tensor  # row and column of the word to change, (2, N)
    words: torch.Tensor  # ids of the words to add (N,)
    weights: torch.Tensor  # times these (N,)

    def to(self, device: torch.device) -> "Captions":
        return Captions(*(part.to(device, non_blocking=True) for part in self))

    def blend(self, module: torch.nn.Module, inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
        """A forward hook of a token embedding."""
        added = module.weight[self.words] * self.weights[:, None]
        return embedded.index_put(tuple(self.places), added, accumulate=True)


def draw_captions(tokenizer: Any, attributes: list[Attributes], rng: np.random.Generator) -> Captions:
    texts, changes = zip(*(blended(each, rng) for each in attributes), strict=True)
    ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids

    def number(word):
        return tokenizer.convert_tokens_to_ids(f"{word}{END_OF_WORD}")
    rows = [(row, tokens.index(number(place)), number(word), weight)
            for row, (own, tokens) in enumerate(zip(changes, ids.tolist(), strict=True))
            for weight, word, place in own]
    table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 4)
    return Captions(ids, table[:, :2].T.long(), table[:, 2].long(), table[:, 3].float())


class Batches(Dataset):
    """The batch of every step: numbers of scenes, and their captions."""

    def __init__(self, tokenizer: Any, attributes: list[Attributes], size: int):
        self.tokenizer, self.attributes, self.size = tokenizer, attributes, size

    def __getitem__(self, step: int) -> tuple[torch.Tensor, Captions]:
        rng = np.random.default_rng([step, 1])
        index = rng.integers(len(self.attributes), size=self.size)
        captions = draw_captions(self.tokenizer, [self.attributes[i] for i in index], rng)
        return torch.from_numpy(index), captions


def draw_timesteps(model: Model, count: int) -> torch.Tensor:
    """Timesteps (count,), stratified over the batch.

    A U-Net gets more high ones: they decide shape and layout. The sigma of a flow model is logit-normal
    (Esser et al. 2024, "Scaling rectified flow transformers").
    """
    u = (torch.arange(count, device=model.device) + torch.rand(count, device=model.device)) / count
    share = torch.special.ndtri(u).sigmoid() if isinstance(model, Flow) else u**0.75
    return (share * 1000).long().clamp(max=999)


def loss_weight(model: Model, timesteps: torch.Tensor) -> torch.Tensor:
    """Weights (B, 1, 1, 1): 1 for velocities.

    For noise, half way between its loss (weight 1) and that of velocity (1 / alpha_bar), to learn outlines,
    not only texture.
    """
    if isinstance(model, Flow) or model.scheduler.config.prediction_type == "v_prediction":
        return torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
    return model.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].rsqrt().view(-1, 1, 1, 1)


def batch_loss(model: Model, z0: torch.Tensor, captions: Captions) -> dict[str, torch.Tensor]:
    """The loss of latents (B, 4, 16, 16) of scenes with these captions, and what to log beside it."""
    timesteps = draw_timesteps(model, len(z0))
    with contextlib.ExitStack() as stack:
        for encoder in model.text_encoders:
            stack.enter_context(encoder.get_input_embeddings().register_forward_hook(captions.blend))
        condition = model.condition([captions.ids] * len(model.tokenizers))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        error = residual(model, z0, torch.randn_like(z0), timesteps, condition).square()
    is_high = (timesteps >= 500).view(-1, 1, 1, 1)  # sums, as a GPU would wait for a selection
    return {"loss": (loss_weight(model, timesteps) * error).mean(), "unweighted": error.mean().detach(),
            "high_t": ((error * is_high).mean() / is_high.float().mean()).detach()}


def build(args: argparse.Namespace, folder: Path) -> tuple[StableDiffusion, dict[str, torch.nn.Module]]:
    """The model to train, and those of its networks that are trained, by name."""
    if args.family == "sd" and args.prediction_type == "epsilon":
        tokenizer = pocket_tokenizer(folder / "tokenizer")
        modules = {"unet": grow.new_unet(), "text_encoder": grow.new_text_encoder(tokenizer)}
        if args.start_from:
            for name, module in modules.items():
                module.load_state_dict(
                    type(module).from_pretrained(args.start_from, subfolder=name).state_dict())
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        return StableDiffusion(str(folder), [tokenizer], [modules["text_encoder"]], vae, modules["unet"],
                               DDPMScheduler(**grow.SCHEDULE)), modules
    first = load_model(args.start_from or pocket.model_path())
    if args.family == "sd":
        model = grow.grow_velocity(first)
    else:
        model = grow.grow_sdxl(first) if args.family == "sdxl" else grow.grow_flow(first, patch=args.patch)
        grow.balance(model)
    for part in (*model.text_encoders, model.network):
        part.requires_grad_(part is model.network)
    return model, {model.network_name: model.network}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = training_parser(__doc__, steps=3000, batch_size=32, lr=3e-3)
    add = parser.add_argument
    add("--family", choices=("sd", "sdxl", "flow"), default="sd")
    add("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon",
        help="v_prediction: on a noise schedule that ends in pure noise, from a trained model (sd only)")
    add("--start_from", help="grow from this Stable Diffusion model, or train one of the family further "
                             "(default for all but the first model: the bundled Stable Diffusion)")
    add("--patch", type=int, choices=(1, 2), default=1, help="side of a new flow model's patches, in latents")
    add("--workers", type=int, default=0, help="processes that draw captions ahead, for a fast GPU")
    args = parser.parse_args(argv)
    if args.family != "sd" and args.prediction_type != "epsilon":
        parser.error(f"--prediction_type is of --family sd; a model of --family {args.family} has its own")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    kind = {"sd": "" if args.prediction_type == "epsilon" else "-v"}.get(args.family, f"-{args.family}")
    folder = args.work_dir / f"model{kind}"
    images, attributes = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    torch.manual_seed(0)
    model, modules = build(args, folder)
    for part in (*model.text_encoders, model.vae):
        part.to(device)
    model.network.to(device, memory_format=torch.channels_last)
    weights = Path(model.path, "vae", "diffusion_pytorch_model.safetensors").read_bytes()
    name = f"latents-{args.scenes}-{hashlib.sha256(weights).hexdigest()[:8]}.pt"
    latents = cached_latents(model.vae, images, args.work_dir / name, device).to(device)
    trained = [(name, p) for module in modules.values() for name, p in module.named_parameters()]
    # Rows of a table of tokens or positions are no matrix.
    tables = [p for name, p in trained if "token_embedding" in name or "position_embedding" in name]
    others = [p for _, p in trained if not any(p is table for table in tables)]
    optimizer = Muon([{"params": others}, {"params": tables, "adam": True}], args.lr)
    averages = {name: Average(module, 0.998) for name, module in modules.items()}
    if args.compile:
        model.network.compile()

    batches, ahead = Batches(model.tokenizers[0], attributes, args.batch_size), None

    def step_loss(step):
        nonlocal ahead
        if ahead is None:  # the loader has a generator of its own, as the step's draws are seeded
            ahead = iter(DataLoader(batches, None, sampler=range(step, args.steps), num_workers=args.workers,
                                    pin_memory=device.type == "cuda", generator=torch.Generator()))
        index, captions = next(ahead)
        z0 = latents[index.to(device)].float().contiguous(memory_format=torch.channels_last)
        return batch_loss(model, z0, captions.to(device))

    train(f"diffusion{kind}", args, modules, optimizer, step_loss, averages)
    for average in averages.values():
        average.copy_to_module()
    grow.merge(model.network)
    grow.write(model, folder)


if __name__ == "__main__":
    main()

"""Train the pocket U-Net and text encoder together on cached latents:

    python examples/train_pocket/train_diffusion.py

Needs a VAE in `work_dir/model/vae`, of train_vae.py or train_encoder.py; writes the whole model, in Diffusers
format, to `work_dir/model`.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from recipe import TRAINING_SEEDS, Average, Muon, pixels, scenes, train, training_parser
from transformers import CLIPTextConfig, CLIPTextModel

from szt_utils.images import to_vae_range
from szt_utils.models import residual
from szt_utils.models.stable_diffusion import StableDiffusion
from szt_utils.pocket.scenes import BACKGROUNDS, COLORS, PATTERNS, SHAPES
from szt_utils.pocket.vocabulary import OBJECT_WORD, pocket_tokenizer, training_caption, words

SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                steps_offset=1, clip_sample=False)


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(80, 160),
        norm_num_groups=16, cross_attention_dim=128,
        attention_head_dim=5,  # Diffusers takes this for the number of heads
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])


def new_text_encoder(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


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


def main() -> None:
    parser = training_parser(__doc__, steps=3000, batch_size=32, lr=3e-3)
    parser.add_argument("--start_from", help="start from this model's U-Net and text encoder")
    args = parser.parse_args()
    device = torch.device(args.device)
    images, attributes = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    model_dir = args.work_dir / "model"
    vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae").to(device)
    weights = (model_dir / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    name = f"latents-{args.scenes}-{hashlib.sha256(weights).hexdigest()[:8]}.pt"
    latents = cached_latents(vae, images, args.work_dir / name, device)
    tokenizer = pocket_tokenizer(model_dir / "tokenizer")
    number = {word: tokenizer(word).input_ids[1] for word in words()}
    scheduler = DDPMScheduler(**SCHEDULE)

    torch.manual_seed(0)
    unet = new_unet().to(device, memory_format=torch.channels_last)
    text_encoder = new_text_encoder(tokenizer).to(device)
    modules = {"unet": unet, "text_encoder": text_encoder}
    model = StableDiffusion(str(model_dir), [tokenizer], [text_encoder], vae, unet, scheduler)
    if args.start_from:
        for name, module in modules.items():
            module.load_state_dict(
                type(module).from_pretrained(args.start_from, subfolder=name).state_dict())
    tables = [p for name, p in text_encoder.named_parameters() if "embedding" in name]
    others = [p for m in modules.values() for p in m.parameters() if not any(p is table for table in tables)]
    optimizer = Muon([{"params": others}, {"params": tables, "adam": True}], args.lr)
    averages = {name: Average(module, 0.998) for name, module in modules.items()}
    if args.compile:
        unet.compile()

    def step_loss(step):
        rng = np.random.default_rng([step, 1])
        index = rng.integers(len(latents), size=args.batch_size)
        captions, changes = zip(*(blended(attributes[i], rng) for i in index), strict=True)
        ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
        rows, places, weights, added_words = [], [], [], []
        for row, (own, tokens) in enumerate(zip(changes, ids.tolist(), strict=True)):
            for weight, word, place in own:
                rows.append(row)
                places.append(tokens.index(number[place]))
                weights.append(weight)
                added_words.append(number[word])

        def blend(module, inputs, embedded):
            where = torch.tensor([rows, places], device=device)
            added = module.weight[added_words] * torch.tensor(weights, device=device)[:, None]
            return embedded.index_put(tuple(where), added, accumulate=True)
        z0 = latents[index].to(device).float().contiguous(memory_format=torch.channels_last)
        # Stratified over the batch, with more high timesteps: they decide shape and layout.
        u = (torch.arange(len(z0), device=device) + torch.rand(len(z0), device=device)) / len(z0)
        timesteps = (u**0.75 * 1000).long().clamp(max=999)
        with text_encoder.get_input_embeddings().register_forward_hook(blend):
            condition = model.condition([ids])
        error = residual(model, z0, torch.randn_like(z0), timesteps, condition).square()
        # Half way between the losses of noise (weight 1) and velocity (1 / alpha_bar), to learn outlines, not
        # only texture.
        weight = scheduler.alphas_cumprod.to(device)[timesteps].rsqrt().view(-1, 1, 1, 1)
        return {"loss": (weight * error).mean(), "unweighted": error.mean().detach(),
                "high_t": error[timesteps >= 500].mean().detach()}

    train("diffusion", args, modules, optimizer, step_loss, averages)
    for average in averages.values():
        average.copy_to_module()
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, safety_checker=None,
        feature_extractor=None, scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False))
    pipeline.save_pretrained(model_dir)
    pocket_tokenizer(model_dir / "tokenizer")  # vocab.json and merges.txt, for readers of older transformers


if __name__ == "__main__":
    main()

"""Train the pocket metric networks:

    python examples/train_pocket/train_metrics.py --network dino
    python examples/train_pocket/train_metrics.py --network clip

dino: a vision transformer in Dinov2Model format, with linear heads that read shape, color, pattern and
background from its CLS feature. Unlike the real DINOv2, it is trained with those labels. clip: a CLIPModel,
trained contrastively on captions; it starts from the dino network and the diffusion model's text encoder.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from recipe import HELD_OUT_SEEDS, TRAINING_SEEDS, Average, Muon, pixels, scenes, train, training_parser
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from szt_utils.attributes import WORDS
from szt_utils.pocket.vocabulary import pocket_tokenizer, training_caption

INPUT = 64  # pixels: images are halved first
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def labels_of(attributes) -> torch.Tensor:
    """Word indices, long (N, 4), in the order of WORDS."""
    return torch.tensor([[words.index(getattr(a, name)) for name, words in WORDS.items()]
                         for a in attributes])


def halved(images, index, device) -> torch.Tensor:
    return F.avg_pool2d(pixels([images[i] for i in index], device), 2)


def augment(x: torch.Tensor) -> torch.Tensor:
    """Mirror, shift and zoom each image a little, change its brightness, blur it and add noise.

    These are the errors of image generators.
    """
    n, device = len(x), x.device
    theta = torch.zeros(n, 2, 3, device=device)
    zoom = torch.empty(n, device=device).uniform_(0.85, 1.1)
    theta[:, 0, 0] = zoom * torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = torch.empty(n, 2, device=device).uniform_(-0.12, 0.12)
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="reflection",
                      align_corners=False)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, torch.rand(n, 1, 1, 1, device=device) * 0.8)
    x = x * torch.empty(n, 1, 1, 1, device=device).uniform_(0.9, 1.1)
    return x + torch.randn_like(x) * torch.rand(n, 1, 1, 1, device=device) * 0.05


def normalized(x: torch.Tensor) -> torch.Tensor:
    return (x - MEAN[0]) / STD[0]


def save_processor(folder) -> None:
    BitImageProcessor(do_resize=True, size={"height": INPUT, "width": INPUT}, resample=2,
                      do_center_crop=False, do_rescale=True, do_normalize=True,
                      image_mean=MEAN, image_std=STD).save_pretrained(folder)


@torch.no_grad()
def accuracy(dino, heads, images, labels, device) -> dict[str, float]:
    logits = [heads(dino(normalized(halved(images, part, device))).pooler_output)
              for part in torch.arange(len(images)).split(64)]
    guesses = torch.cat(logits).split([len(words) for words in WORDS.values()], dim=1)
    return {name: (guess.argmax(1).cpu() == labels[:, i]).float().mean().item()
            for i, (name, guess) in enumerate(zip(WORDS, guesses, strict=True))}


def train_dino(args, device):
    images, attributes = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    held_out, held_out_attributes = scenes(512, HELD_OUT_SEEDS, args.work_dir)
    labels = labels_of(attributes).to(device)
    torch.manual_seed(0)
    dino = Dinov2Model(Dinov2Config(
        image_size=INPUT, patch_size=8, hidden_size=128, num_hidden_layers=5, num_attention_heads=4,
        mlp_ratio=3)).to(device)
    sizes = [len(words) for words in WORDS.values()]
    heads = torch.nn.Linear(128, sum(sizes)).to(device)
    if args.start_from:
        dino.load_state_dict(Dinov2Model.from_pretrained(args.start_from).state_dict())
        heads.load_state_dict(load_file(Path(args.start_from) / "attributes.safetensors"))
    average = Average(torch.nn.ModuleList([dino, heads]), 0.998)
    optimizer = Muon([*dino.parameters(), *heads.parameters()], args.lr)

    def step_loss(step):
        index = np.random.default_rng([step, 2]).integers(len(images), size=args.batch_size)
        features = dino(normalized(augment(halved(images, index, device)))).pooler_output
        losses = [F.cross_entropy(logits, labels[index, i], label_smoothing=0.02)
                  for i, logits in enumerate(heads(features).split(sizes, dim=1))]
        return {"loss": sum(losses), **dict(zip(WORDS, losses, strict=True))}

    train("dino", args, {"dino": dino, "heads": heads}, optimizer, step_loss, {"both": average})
    average.copy_to_module()
    dino.eval()
    print("held-out accuracy:", accuracy(dino, heads, held_out, labels_of(held_out_attributes), device))
    folder = args.work_dir / "dino"
    dino.save_pretrained(folder)
    save_processor(folder)
    save_file({"weight": heads.weight.detach().cpu(), "bias": heads.bias.detach().cpu()},
              folder / "attributes.safetensors")


def start_from_dino(vision, dino_state: dict[str, torch.Tensor]) -> None:
    """Copy a Dinov2Model's blocks into a CLIP vision tower.

    The layer scales are multiplied into the projections before them.
    """
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attention.attention.query": "self_attn.q_proj",
             "attention.attention.key": "self_attn.k_proj", "attention.attention.value": "self_attn.v_proj",
             "attention.output.dense": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    scales = {"attention.output.dense": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
    state = {"embeddings.patch_embedding.weight": dino_state["embeddings.patch_embeddings.projection.weight"],
             "embeddings.class_embedding": dino_state["embeddings.cls_token"].flatten(),
             "embeddings.position_embedding.weight": dino_state["embeddings.position_embeddings"][0],
             "post_layernorm.weight": dino_state["layernorm.weight"],
             "post_layernorm.bias": dino_state["layernorm.bias"]}
    for layer in range(len(vision.encoder.layers)):
        for old, new in names.items():
            for kind in ("weight", "bias"):
                value = dino_state[f"encoder.layer.{layer}.{old}.{kind}"]
                if old in scales:
                    scale = dino_state[f"encoder.layer.{layer}.{scales[old]}"]
                    value = value * (scale[:, None] if kind == "weight" else scale)
                state[f"encoder.layers.{layer}.{new}.{kind}"] = value
    missing, unexpected = vision.load_state_dict(state, strict=False)
    assert not unexpected and all("pre_layrnorm" in name or "position_ids" in name
                                  for name in missing), (missing, unexpected)


def train_clip(args, device):
    images, attributes = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    model_dir = args.work_dir / "model"
    tokenizer = CLIPTokenizer.from_pretrained(model_dir / "tokenizer")
    text_start = CLIPTextModel.from_pretrained(model_dir / "text_encoder")
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(
        text_config=text_start.config.to_dict(), projection_dim=64,
        vision_config=dict(image_size=INPUT, patch_size=8, hidden_size=128, num_hidden_layers=5,
                           num_attention_heads=4, intermediate_size=384, hidden_act="gelu",
                           projection_dim=64))).to(device)
    clip.text_model.load_state_dict(getattr(text_start, "text_model", text_start).state_dict())
    start_from_dino(clip.vision_model, load_file(args.work_dir / "dino" / "model.safetensors"))
    average = Average(clip, 0.99)
    optimizer = torch.optim.AdamW(clip.parameters(), args.lr, weight_decay=0.01)

    def step_loss(step):
        rng = np.random.default_rng([step, 3])
        index = rng.integers(len(images), size=args.batch_size)
        captions = [training_caption(attributes[i], rng) or "a photo of a object" for i in index]
        ids = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        x = normalized(augment(halved(images, index, device)))
        return {"loss": clip(**ids, pixel_values=x, return_loss=True).loss}

    train("clip", args, {"clip": clip}, optimizer, step_loss, {"clip": average})
    average.copy_to_module()
    folder = args.work_dir / "clip"
    clip.save_pretrained(folder)
    # A new tokenizer: a used one would be saved with the padding of its last texts.
    pocket_tokenizer(folder).save_pretrained(folder)
    save_processor(folder)


def main() -> None:
    parser = training_parser(__doc__, steps=2000, batch_size=64, lr=2e-3)
    parser.add_argument("--network", choices=["dino", "clip"], required=True)
    parser.add_argument("--start_from", help="dino: folder of weights to start from")
    args = parser.parse_args()
    {"dino": train_dino, "clip": train_clip}[args.network](args, torch.device(args.device))


if __name__ == "__main__":
    main()

"""Train the pocket Segment Anything model:

    python examples/train_pocket/train_sam.py

A small `Sam` of the segment-anything package: 128-pixel images, patches of 8, windows of 8. A mask is the
region of the positive clicks: the object, a second object, or the background. Every step draws new images,
some with two objects, and perturbs them up to a poison's budget. The mask prompt is not trained.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from recipe import TRAINING_SEEDS, Average, Muon, draw, pixels, train, training_parser
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from szt_utils.pocket.scenes import SIZE

PATCH, WINDOW, WIDTH, DEPTH, HEADS, GLOBAL = 8, 8, 128, 4, 4, (1, 3)
OUT = 128  # channels of the embedding
PROMPTS = 2  # per image and step
# The prompts of a step: number of points, whether there is a box; and how often each layout is drawn.
LAYOUTS, SHARES = ((1, False), (2, False), (3, False), (0, True), (1, True)), (0.6, 0.12, 0.08, 0.14, 0.06)


def build() -> Sam:
    grid = SIZE // PATCH
    return Sam(
        ImageEncoderViT(img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
                        mlp_ratio=3, out_chans=OUT, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
                        use_rel_pos=True, window_size=WINDOW, global_attn_indexes=GLOBAL),
        PromptEncoder(embed_dim=OUT, image_embedding_size=(grid, grid), input_image_size=(SIZE, SIZE),
                      mask_in_chans=16),
        MaskDecoder(transformer_dim=OUT, iou_head_hidden_dim=OUT,
                    transformer=TwoWayTransformer(depth=2, embedding_dim=OUT, mlp_dim=512, num_heads=8)))


def draw_image(seed: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """An image, uint8 (128, 128, 3), its regions, bool (128, 128), and where it is not padding.

    The regions are one or two objects, then the background. An image that is not square is padded.
    """
    scene, rng = draw(seed), np.random.default_rng([seed, 1])
    image, masks = scene.image, [scene.mask]
    if rng.random() < 0.3:
        other = draw(seed + 1_000_000)
        rest = scene.mask & ~other.mask
        if rest.sum() > 200:
            image, masks = np.where(other.mask[..., None], other.image, image), [rest, other.mask]
    inside = np.ones((SIZE, SIZE), bool)
    if rng.random() < 0.2:
        cut = np.s_[:, rng.integers(80, SIZE):] if rng.random() < 0.5 else np.s_[rng.integers(80, SIZE):]
        inside[cut] = False
    return image, [*(mask & inside for mask in masks), inside & ~np.any(masks, axis=0)], inside


def perturb(x: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] with changed brightness and contrast, half of them with noise.

    The noise, or its signs, has a random grain and up to 18 levels of 255, more than a poison may add.
    """
    n = len(x)
    contrast, brightness = x.new_empty(n, 1, 1, 1), x.new_empty(n, 3, 1, 1)
    x = (x - 0.5) * contrast.uniform_(0.85, 1.15) + brightness.uniform_(0.46, 0.54)
    grain = [SIZE, SIZE // 2, SIZE // 4, SIZE // 8][torch.randint(4, ()).item()]
    noise = F.interpolate(x.new_empty(n, 3, grain, grain).normal_(), (SIZE, SIZE), mode="bicubic")
    is_sign, strength, is_noisy = (x.new_empty(n, 1, 1, 1).uniform_() for _ in range(3))
    noise = torch.where(is_sign < 0.5, noise.sign(), (0.6 * noise).clamp(-1, 1))
    return (x + noise * strength * is_noisy.round() * 18 / 255).clamp(0, 1)


def prompt(rng, regions: list[np.ndarray], points: int, box: bool):
    """Points (points, 2) in pixels, their labels, a box (4,), and their region; a box is of an object."""
    index = rng.integers(len(regions) - 1) if box or rng.random() < 0.75 else len(regions) - 1
    region = regions[index]
    if region.sum() < 20:  # cut off by the padding
        region = regions[-1]
    ys, xs = np.nonzero(region)
    coords, labels = [], []
    for i in range(points):
        inside = i == 0 or rng.random() < 0.5
        y, x = (ys, xs) if inside else np.nonzero(~region)
        k = rng.integers(len(y))
        coords.append((x[k], y[k]))
        labels.append(int(inside))
    corners = np.array([xs.min(), ys.min(), xs.max(), ys.max()]) + rng.normal(0, 2, 4)
    return coords, labels, corners.clip(0, SIZE - 1), region


def decode(sam: Sam, embeddings: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor):
    """All four masks and their estimated overlaps, for prompts that each have an embedding (N, C, h, w).

    The decoder's own forward takes prompts of one image only.
    """
    decoder, n = sam.mask_decoder, len(sparse)
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(n, -1, -1)
    place = sam.prompt_encoder.get_dense_pe().expand(n, -1, -1, -1)
    tokens, grid = decoder.transformer(embeddings + dense, place, torch.cat([output, sparse], dim=1))
    upscaled = decoder.output_upscaling(grid.transpose(1, 2).reshape(embeddings.shape))
    weights = torch.stack([mlp(tokens[:, 1 + i])
                           for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    return torch.einsum("nmc,nchw->nmhw", weights, upscaled), decoder.iou_prediction_head(tokens[:, 0])


def losses_of(logits: torch.Tensor, guesses: torch.Tensor, target: torch.Tensor):
    """Cross entropy and Dice loss of logits (N, 4, H, W); of masks 1 to 3, the best counts most."""
    share = logits.sigmoid()
    dice = 1 - (2 * (share * target).sum((2, 3)) + 1) / ((share + target).sum((2, 3)) + 1)
    error = 2 * F.binary_cross_entropy_with_logits(logits, target.expand_as(logits),
                                                   reduction="none").mean((2, 3))
    per_mask = dice + error
    with torch.no_grad():
        found, true = logits > 0, target > 0.5
        overlap = (found & true).sum((2, 3)) / (found | true).sum((2, 3)).clamp(min=1)
    one, three = per_mask[:, 0], per_mask[:, 1:]
    mask_loss = (one + 0.9 * three.min(1).values + 0.1 * three.mean(1)).mean()
    return mask_loss, F.mse_loss(guesses, overlap), overlap[:, 0].mean(), overlap[:, 1:].max(1).values.mean()


def main() -> None:
    parser = training_parser(__doc__, steps=900, batch_size=16, lr=2e-3)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sam = build().to(args.device)
    average = Average(sam, 0.995)
    trained = [p for name, p in sam.named_parameters() if "mask_downscaling" not in name]
    optimizer = Muon(trained, args.lr)

    def step_loss(step):
        rng = np.random.default_rng([step, 5])
        points, box = LAYOUTS[rng.choice(len(LAYOUTS), p=SHARES)]
        first = TRAINING_SEEDS + step * args.batch_size
        drawn = [draw_image(first + i) for i in range(args.batch_size)]
        prompts = [prompt(rng, regions, points, box) for _, regions, _ in drawn for _ in range(PROMPTS)]
        coords, labels, corners, regions = (torch.tensor(np.array(part, np.float32), device=args.device)
                                            for part in zip(*prompts, strict=True))
        x = perturb(pixels([image for image, _, _ in drawn], args.device))
        inside = torch.tensor(np.array([inside for _, _, inside in drawn]), device=args.device)[:, None]
        embeddings = sam.image_encoder(sam.preprocess(x * 255) * inside)
        sparse, dense = sam.prompt_encoder(
            points=(coords, labels) if points else None, boxes=corners if box else None, masks=None)
        logits, guesses = decode(sam, embeddings.repeat_interleave(PROMPTS, 0), sparse, dense)
        target = F.interpolate(regions[:, None], logits.shape[-2:], mode="area")
        mask_loss, guess_loss, one, best = losses_of(logits, guesses, target)
        return {"loss": mask_loss + guess_loss, "guess": guess_loss, "overlap": one, "best_of_three": best}

    train("sam", args, {"sam": sam}, optimizer, step_loss, {"sam": average})
    average.copy_to_module()
    state = {name: value.detach().half().cpu() for name, value in sam.state_dict().items()}
    torch.save(state, args.work_dir / "sam.pth")


if __name__ == "__main__":
    main()

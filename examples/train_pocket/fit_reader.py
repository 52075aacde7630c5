"""Fit the heads that read shape, color, pattern and background to the features of the pocket image encoder:

    python examples/train_pocket/fit_reader.py

train_metrics.py trains encoder and heads without the novel concepts. The evaluation must recognize these, so
only the heads are fitted again, to scenes of all combinations and of the novel concepts. Replaces
`attributes.safetensors` in the folder of --dino, and prints the accuracy on scenes with other seeds. Then it
centers the encoder's features: the similarity of images that have nothing in common is then about 0.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from train_metrics import labels_of

from szt_utils import pocket
from szt_utils.arguments import number, script_parser, user_path
from szt_utils.attributes import WORDS
from szt_utils.metrics import image_features
from szt_utils.pocket.scenes import NOVEL_CONCEPTS, Attributes, Scene, draw_scene

FIRST_SEED, TEST_SEED = 12_000_000, 13_000_000  # neither training nor held-out scenes have these seeds
SIZES = [len(words) for words in WORDS.values()]


def any_scene(seed: int, novel: bool) -> Scene:
    """The scene of a seed: a novel concept, the next one with every seed, or any combination of words."""
    rng = np.random.default_rng([seed, 1])  # not the one that draws place and size
    words = {kind: str(rng.choice(choices)) for kind, choices in WORDS.items()}
    if novel:
        color, pattern, shape = list(NOVEL_CONCEPTS.values())[seed % len(NOVEL_CONCEPTS)]
        words |= {"color": color, "pattern": pattern, "shape": shape}
    return draw_scene(seed, Attributes(**words))


def examples(dino: str, first_seed: int, count: int, novel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (count, D) of scenes and the indices of their words, long (count, 4)."""
    scenes = [any_scene(first_seed + i, novel) for i in range(count)]
    features = image_features([Image.fromarray(scene.image) for scene in scenes], dino, normalized=False)
    return features, labels_of([scene.attributes for scene in scenes])


def fit(state: dict[str, torch.Tensor], features: torch.Tensor, labels: torch.Tensor) -> None:
    """Minimize the heads' cross-entropy, with a little weight decay, from their `state`, in place."""
    weight, bias = (state[name].requires_grad_() for name in ("weight", "bias"))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (features @ weight.T + bias).split(SIZES, dim=1)
        total = (sum(F.cross_entropy(part, labels[:, i]) for i, part in enumerate(logits))
                 + 1e-4 * weight.square().sum())
        total.backward()
        return total

    optimizer.step(loss)


def center(folder: Path, mean: torch.Tensor) -> None:
    """Subtract a mean (D,) from all features of an encoder by its last bias; the heads read the same."""
    dino, heads = (load_file(folder / name) for name in ("model.safetensors", "attributes.safetensors"))
    dino["layernorm.bias"] -= mean
    heads["bias"] += heads["weight"] @ mean
    save_file(dino, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(heads, folder / "attributes.safetensors")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--dino", type=user_path, default=pocket.dino_path())
    parser.add_argument("--scenes", type=number(int, 1), default=4000,
                        help="of any combination; a quarter as many novel ones are added (4000)")
    args = parser.parse_args()
    path = Path(args.dino) / "attributes.safetensors"
    state = load_file(path)
    parts = [examples(args.dino, FIRST_SEED, args.scenes, novel=False),
             examples(args.dino, FIRST_SEED + args.scenes, max(1, args.scenes // 4), novel=True)]
    fit(state, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    state = {name: tensor.detach() for name, tensor in state.items()}
    for name, novel in (("any combination", False), ("novel concepts", True)):
        features, labels = examples(args.dino, TEST_SEED, 500, novel)
        logits = (features @ state["weight"].T + state["bias"]).split(SIZES, dim=1)
        right = [(part.argmax(1) == labels[:, i]).float().mean() for i, part in enumerate(logits)]
        print(f"{name}:", ", ".join(f"{kind} {share:.1%}"
                                    for kind, share in zip(WORDS, right, strict=True)))
    save_file(state, path)
    center(path.parent, parts[0][0].mean(0))


if __name__ == "__main__":
    main()

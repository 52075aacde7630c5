"""Measure how the bundled Segment Anything model's features vary over drawn scenes:

    python examples/train_pocket/fit_familiarity.py

Run it after bundle.py. `precompute_masks.py` compares a user's images with the result.
"""

import numpy as np
import torch
from PIL import Image
from recipe import TRAINING_SEEDS
from safetensors.torch import save_file
from train_sam import draw_image, perturb

from szt_utils.arguments import script_parser
from szt_utils.familiarity import fit, spread
from szt_utils.pocket import familiarity_path
from szt_utils.segment import load_segmenter


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=1200)
    args = parser.parse_args()
    torch.manual_seed(0)
    segmenter, spreads = load_segmenter(), []
    for seed in range(TRAINING_SEEDS, TRAINING_SEEDS + args.scenes):
        image, _, inside = draw_image(seed)
        pixels = perturb(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0]
        rows, columns = np.nonzero(inside)  # without the padding, which the model adds itself
        pixels = pixels[:, :rows.max() + 1, :columns.max() + 1]
        drawn = Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())
        spreads.append(spread(segmenter.embed(drawn).features))
    save_file(fit(torch.stack(spreads)), familiarity_path())
    print(familiarity_path())


if __name__ == "__main__":
    main()

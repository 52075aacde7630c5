"""What the trainers have in common: the plan of a data set, and what can be wrong with one.

A trainer is one file: the sizes that it keeps, where it wants the masks, its config files, its traps, and
what its settings mean. A check yields one sentence per finding.
"""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ..errors import InputError
from ..image_formats import SUFFIXES
from ..images import MASK_ENDING
from ..safe_zone import SafeZone
from .buckets import Size
from .config_files import Config
from .family import Family

__all__ = ["LEARNING_RATE", "MAX_TRAIN_STEPS", "RANK", "SIGMOID_SCALE", "Plan", "Source", "Trainer",
           "any_case", "flux_shift", "range_findings", "read_size", "share_findings", "share_in_zone",
           "shifted"]

# Of the LoRA in the config files: a start, not a recommendation.
RANK = 16
LEARNING_RATE = 1e-4
MAX_TRAIN_STEPS = 1000
MIN_SNR_GAMMA = 5.0  # with velocities and masks: without it, SZT recovered nothing on a small model
# For trainers without a range of timesteps: sigmoid(0.5 * normal), shifted until 98.8 % is in the zone.
SIGMOID_SCALE, _AIM = 0.5, 0.988
_SHARE = 0.95  # of the draws in the zone that is enough where no range can be set


def any_case(suffixes: Sequence[str]) -> tuple[str, ...]:
    """Suffixes in upper and in lower case."""
    return (*(suffix.upper() for suffix in suffixes), *suffixes)


@dataclass(frozen=True)
class Plan:
    """A data set for a trainer: its absolute folder, the model's family, and where training is safe.

    `token` is what captions call the concept, `sizes` are those of the images, `captions` belong to the
    images by file name.
    """

    folder: Path
    family: Family
    zone: SafeZone
    resolution: int
    token: str = ""
    has_masks: bool = True
    sizes: Sequence[Size] = ()
    captions: Mapping[str, str] = field(default_factory=dict)

    @property
    def min_snr_gamma(self) -> float | None:
        """Gamma of Min-SNR weighting; None where the loss is the plain one."""
        return MIN_SNR_GAMMA if self.family.velocity and self.has_masks else None

    @property
    def shift(self) -> float:
        """The shift that puts 98.8 % of the draws in the zone, to two digits; 1 where more are in it anyway.

        With x = t_min / T and the normal's quantile z(0.988): x / (1 - x) * exp(SIGMOID_SCALE z).
        """
        odds = self.zone.t_min / (self.family.num_timesteps - self.zone.t_min)
        return max(1.0, float(f"{odds * math.exp(SIGMOID_SCALE * NormalDist().inv_cdf(_AIM)):.2g}"))

    @property
    def images(self) -> str:
        return (self.folder / "images").as_posix()

    @property
    def masks(self) -> str:
        return (self.folder / "masks").as_posix()

    @property
    def output(self) -> str:
        return (self.folder / "trained").as_posix()

    def file(self, name: str) -> str:
        """The absolute path of a file in the folder."""
        return (self.folder / name).as_posix()

    def quoted(self, name: str) -> str:
        """The same for a shell."""
        return shlex.quote(self.file(name))


@dataclass(frozen=True)
class Source:
    """A folder of images that a config trains on, and its folder of masks, None without masks.

    `size` is the (width, height) that the config sets, None where it sets none. `has_alpha` says that the
    trainer takes masks from the images' alpha channel, `is_fixed` that it trains at `size` alone,
    `is_recursive` that it reads sub-folders.
    """

    images: Path
    masks: Path | None
    size: tuple[float, float] | None = None
    has_alpha: bool = False
    is_fixed: bool = False
    is_recursive: bool = False


@dataclass(frozen=True)
class Trainer:
    """A trainer, as it was read in `version`.

    `models` are its own names of the families that it trains. `mask_name` is where an image's mask lies, with
    {} for the stem; None for a trainer without masked loss. `configs` are its config files by name, `command`
    starts it in its own folder, `traps` are what to mind, as functions of a plan. `sources` and `check` read
    its config files. Captions are `<stem>.txt` beside the images, unless `caption_files` is false. Sizes
    within the area whose sides are multiples of `kept_step` are kept, too. `has_min_snr` says whether
    config files weight the loss by Min-SNR, `min_snr` what to set for it.

    It reads images of `image_suffixes` in either case, all without any, and an image's first mask of
    `mask_suffixes` in this case, for None the one of the image's very name. `is_recursive` says that it reads
    sub-folders of images, `reads_any_mask` that it reads masks as this project does, not as weights.
    """

    name: str
    title: str
    version: str
    models: Mapping[str, Any]
    buckets: Callable[[int, str], list[Size]]
    mask_name: str | None
    configs: Callable[[Plan], dict[str, str]]
    command: Callable[[Plan], str]
    traps: Callable[[Plan], Sequence[str]]
    sources: Callable[[Plan, Config], list[Source]]
    check: Callable[[Plan, Config], Iterator[str]]
    caption_files: bool = True
    kept_step: int | None = None
    has_min_snr: Callable[[Config], bool] = lambda config: False
    min_snr: str = ""
    image_suffixes: Sequence[str] = ()
    mask_suffixes: Sequence[str] | None = any_case(sorted(SUFFIXES))
    is_recursive: bool = False
    reads_any_mask: bool = False

    def keeps(self, size: Size, resolution: int, family: str) -> bool:
        """Whether the trainer trains at a size as it is."""
        is_within = (self.kept_step is not None and size[0] * size[1] <= resolution**2
                     and not any(side % self.kept_step for side in size))
        return is_within or size in self.buckets(resolution, family)

    @property
    def masks_beside_images(self) -> bool:
        return self.mask_name is not None and self.mask_name.startswith("images/")

    def mask_names(self, image: Path) -> list[str]:
        """Where it looks for an image's mask: paths in the folder of masks, of a path in that of images."""
        if self.mask_suffixes is None:
            return [image.as_posix()]
        stem = image.with_suffix("").as_posix() + MASK_ENDING if self.masks_beside_images else image.stem
        return [stem + suffix for suffix in self.mask_suffixes]

    def model(self, plan: Plan) -> Any:
        """Its own name of the plan's family; InputError lists the families that it trains."""
        if plan.family.name not in self.models:
            raise InputError(f"{self.title} does not train {plan.family.title}; choose --model from: "
                             f"{', '.join(self.models)}.")
        return self.models[plan.family.name]


def read_size(value: Any) -> tuple[float, float] | None:
    """The (width, height) of a resolution in a config: 512, "512,768", "512x768" or [512, 768].

    None for megapixels.
    """
    sides = value if isinstance(value, list) else re.split("[,x]", str(value or 0))
    sides = [float(side) for side in sides]
    return (sides[0], sides[-1]) if all(64 <= side <= 2**16 for side in sides) else None


def range_findings(plan: Plan, low: float, high: float, names: tuple[str, str],
                   scale: float = 1) -> Iterator[str]:
    """Findings about a range of timesteps [low, high), in units of `scale` timesteps."""
    t_min = plan.zone.t_min
    if high * scale <= t_min:
        yield (f"{names[1]} is {high:g}, so training draws only the timesteps below {t_min}, where poisons "
               f"act: the range is the wrong way round; set {names[0]} to {t_min / scale:g} and {names[1]} "
               f"to {plan.family.num_timesteps / scale:g}.")
    elif low * scale < t_min:
        yield (f"{names[0]} is {low:g}, so training reaches timesteps below {t_min}, where poisons act; set "
               f"it to {t_min / scale:g}.")


def shifted(sigma: float, shift: float) -> float:
    """The share of noise `sigma` after a shift s: s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flux_shift(resolution: float) -> float:
    """The shift that FLUX.1's trainers and pipelines derive from a square image's number of patches."""
    patches = (resolution / 16)**2
    return math.exp(0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256))


def share_in_zone(plan: Plan, shift: float = 1, sigmoid_scale: float | None = None) -> float:
    """The share of a flow model's draws that are in the safe zone.

    The draws are uniform, or the sigmoid of a normal of width `sigmoid_scale`, and then shifted.
    """
    x = shifted(plan.zone.t_min / plan.family.num_timesteps, 1 / shift)
    if sigmoid_scale is None or not 0 < x < 1:
        return 1 - x
    return 0.5 * math.erfc(math.log(x / (1 - x)) / (sigmoid_scale * math.sqrt(2)))


def share_findings(plan: Plan, shift: float, sigmoid_scale: float | None, advice: str) -> Iterator[str]:
    """The finding that too few draws are in the safe zone, for trainers that have no range of timesteps."""
    if shift <= 0 or (sigmoid_scale is not None and sigmoid_scale <= 0):
        raise InputError("The shift and the sigmoid scale in the config must be above 0.")
    share = share_in_zone(plan, shift, sigmoid_scale)
    if share < _SHARE:
        yield (f"Only {share:.0%} of the timesteps that training draws are at {plan.zone.t_min} or above; "
               f"set {advice}, which draws {share_in_zone(plan, plan.shift, SIGMOID_SCALE):.1%} there.")

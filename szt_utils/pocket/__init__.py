"""The bundled pocket world: a small, really trained latent diffusion model and the drawn scenes it knows.

    StableDiffusionPipeline.from_pretrained(szt_utils.pocket.model_path())
"""

from pathlib import Path

from ..errors import InputError
from .scenes import BACKGROUNDS, NOVEL_CONCEPTS, concept_scenes

__all__ = ["NOVEL_CONCEPTS", "PROMPTS", "calibration_path", "clip_path", "dino_path", "model_path",
           "pixel_path", "sam_path", "write_concept"]

PROMPTS = tuple(f"a photo of a {{}} on {background}" for background in BACKGROUNDS)

_FOLDER = Path(__file__).parent


def _bundled(name: str) -> str:
    path = _FOLDER / "weights" / name
    if not path.is_dir():
        raise InputError(f"The bundled {name} is missing from '{path}'; "
                         "reinstall the package or train it (examples/pocket).")
    return str(path)


def model_path() -> str:
    """Folder of the pocket Stable Diffusion model, in Diffusers format."""
    return _bundled("diffusion")


def dino_path() -> str:
    """Folder of the pocket image encoder in Dinov2Model format, for similarities."""
    return _bundled("dino")


def clip_path() -> str:
    """Folder of the pocket CLIPModel, for prompt scores."""
    return _bundled("clip")


def pixel_path() -> str:
    """Folder of the pocket diffusion model of pixels, a DDPMPipeline, for PDMPure."""
    return _bundled("pixel")


def sam_path() -> str:
    """The pocket Segment Anything model, a checkpoint of the segment-anything package, for masks."""
    return str(Path(_bundled("sam")) / "sam.pth")


def calibration_path() -> str:
    """File of what clean pictures look like to the pocket model, for `sensitivity_maps.py --diagnose`."""
    return str(_FOLDER / "weights" / "calibration.json")


def write_concept(concept: str, output_dir: str | Path, mask_dir: str | Path | None = None, count: int = 5,
                  seed: int = 0) -> list[Path]:
    """Write `count` pictures of a novel concept as PNGs,
    and masks of the same names when `mask_dir` is given."""
    from PIL import Image

    from ..images import save_png

    paths = []
    for i, scene in enumerate(concept_scenes(concept, count, seed)):
        paths.append(Path(output_dir) / f"{concept}-{i:02d}.png")
        save_png(Image.fromarray(scene.image), paths[-1])
        if mask_dir is not None:
            save_png(Image.fromarray(scene.mask), Path(mask_dir) / paths[-1].name)
    return paths

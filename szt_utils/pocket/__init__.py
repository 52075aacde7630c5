"""The bundled pocket world: small, trained latent diffusion models, and the drawn scenes that they know.

    StableDiffusionPipeline.from_pretrained(szt_utils.pocket.model_path())
"""

from pathlib import Path

from PIL import Image

from ..errors import InputError
from .scenes import BACKGROUNDS, NOVEL_CONCEPTS, concept_scenes

__all__ = ["NOVEL_CONCEPTS", "PROMPTS", "calibration_path", "clip_path", "dino_path", "familiarity_path",
           "is_bundled", "model_path", "pixel_path", "sam_path", "write_concept"]

PROMPTS = tuple(f"a photo of a {{}} on {background}" for background in BACKGROUNDS)

# Another generation of weights gets another name, so that a path always means the same model.
WEIGHTS = Path(__file__).parent / "weights-0.2"


def _bundled(name: str) -> str:
    path = WEIGHTS / name
    if not path.is_dir():
        raise InputError(f"The bundled {name} is missing from '{path}'; "
                         "reinstall the package or train it (examples/train_pocket).")
    return str(path)


def model_path(network: str = "diffusion") -> str:
    """Folder of a pocket model in Diffusers format.

    "diffusion" is a Stable Diffusion model, "sdxl" an SDXL one, "flow" a Stable Diffusion 3 model without T5.
    """
    return _bundled({"flow": "flow-3"}.get(network, network))


def is_bundled(path: str | Path | None) -> bool:
    """Whether a model is one of the pocket world's."""
    return path is not None and Path(path).resolve().is_relative_to(WEIGHTS.resolve())


def dino_path() -> str:
    """Folder of the pocket image encoder in Dinov2Model format, for similarities."""
    return _bundled("dino")


def clip_path() -> str:
    """Folder of the pocket CLIPModel, for prompt scores."""
    return _bundled("clip")


def pixel_path() -> str:
    """Folder of the pocket pixel-space diffusion model, a DDPMPipeline, for PDMPure."""
    return _bundled("pixel")


def sam_path() -> str:
    """File of the pocket Segment Anything model, a checkpoint of the segment-anything package, for masks."""
    return str(Path(_bundled("sam")) / "sam.pth")


def familiarity_path() -> str:
    """File of what is typical of drawn scenes in that model, for `szt_utils.familiarity`."""
    return str(Path(_bundled("sam")) / "familiarity.safetensors")


def calibration_path() -> str:
    """File with the signals of clean images in the pocket model, for `diagnose_images.py`."""
    return str(WEIGHTS / "calibration.json")


def write_concept(concept: str, output_dir: str | Path, mask_dir: str | Path | None = None, count: int = 5,
                  seed: int = 0) -> list[Path]:
    """Write `count` images of a novel concept as 128-pixel PNGs, and with `mask_dir` masks of the same names.

    Returns the paths of the images.
    """
    from ..images import save_png  # imports torch, which printing the path of a network does not need

    paths = []
    for i, scene in enumerate(concept_scenes(concept, count, seed)):
        paths.append(Path(output_dir) / f"{concept}-{i:02d}.png")
        save_png(Image.fromarray(scene.image), paths[-1])
        if mask_dir is not None:
            save_png(Image.fromarray(scene.mask), Path(mask_dir) / paths[-1].name)
    return paths

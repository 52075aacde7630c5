"""How well generated images show the concept and follow their prompts (paper Sec. 5.1.3).

Similarity is the cosine of image-encoder features; compare it with the similarity of the real images to each
other, its anchor: more than that is copying. Attributes are read in the pocket world only. FID, KID and
FD-DINOv2 compare the two sets as wholes, CLIP score each image with its prompt. Networks are folders or Hub
ids; only those named are downloaded.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .attributes import OF_CONCEPT, attribute_scores, can_read
from .errors import InputError, first_line
from .images import from_pil
from .models.parts import check_weights, quiet_loading

__all__ = ["METRICS", "SCORES", "Networks", "clip_scores", "frechet_distance", "image_features",
           "inception_features", "kernel_distance", "pairwise_similarity", "score_images", "similarity"]

METRICS = ("dino", "attributes", "fid", "kid", "fd_dino", "clip")
SCORES = (*METRICS[:2], *OF_CONCEPT, *METRICS[2:])  # the columns of a table
SET_METRICS = ("fid", "kid", "fd_dino")  # of two sets as wholes
FEW_IMAGES = 2048  # below the size of Inception's features their covariance has no full rank


@dataclass(frozen=True)
class Networks:
    """Networks of the metrics: `dino`, a Dinov2Model, `clip`, a CLIPModel, and `inception` for FID and KID.

    `inception` is the file of InceptionV3 weights that torch-fidelity publishes; without it, FID and KID use
    the image features of `clip`, as CLIP-FID does (Kynkaanniemi et al. 2023).
    """

    dino: str
    clip: str
    inception: str | None = None


@functools.lru_cache(maxsize=4)
def _load(network: str, device: str) -> tuple[Any, torch.nn.Module]:
    """The processor and the frozen model of a folder or Hub id."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        # Without the option, transformers would ask in the terminal whether to run a folder's code.
        with quiet_loading():
            processor = AutoImageProcessor.from_pretrained(network, trust_remote_code=False)
            model, report = AutoModel.from_pretrained(network, output_loading_info=True, dtype=torch.float32,
                                                      trust_remote_code=False)
    except Exception as error:
        raise InputError(f"The image encoder '{network}' cannot be loaded: {first_line(error)}") from None
    if not model.config.model_type.startswith(("dinov2", "clip")):
        raise InputError(f"The network '{network}' is neither a Dinov2Model nor a CLIPModel.")
    check_weights(model, report, f"The image encoder '{network}'")
    return processor, model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def image_features(images: list[Image.Image], network: str, batch_size: int = 32,
                   device: torch.device | str = "cpu", normalized: bool = True,
                   kind: str = "image") -> torch.Tensor:
    """Features (N, D) of a Dinov2Model's CLS token or of a CLIPModel's projected images.

    The network's processor prepares the images. Features have unit length if `normalized`. InputError, which
    calls the images `kind`, for a network of another kind and features that are not finite.
    """
    processor, model = _load(str(network), str(device))
    features = []
    for start in range(0, len(images), batch_size):
        inputs = processor(images[start:start + batch_size], return_tensors="pt").to(device)
        if hasattr(model, "visual_projection"):
            output = model.visual_projection(model.vision_model(**inputs).pooler_output)
        else:
            output = model(**inputs).pooler_output
        features.append(output.float().cpu())
    features = torch.cat(features)
    if broken := (~features.isfinite().all(1)).nonzero().flatten().tolist():
        raise InputError(f"The features of {kind} {broken[0] + 1} of {len(images)} by '{network}' are not "
                         "finite; give another image or network.")
    return torch.nn.functional.normalize(features, dim=1) if normalized else features


@torch.no_grad()
def inception_features(images: list[Image.Image], weights: str | Path, batch_size: int = 32,
                       device: torch.device | str = "cpu") -> torch.Tensor:
    """InceptionV3 features (N, 2048) by torch-fidelity, the network that FID is defined with.

    InputError when torch-fidelity or the file `weights` is missing.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise InputError("FID by InceptionV3 needs torch-fidelity: "
                         'pip install "szt-utils[metrics]".') from None
    if not Path(weights).is_file():
        raise InputError(f"The InceptionV3 weights '{weights}' do not exist; "
                         "download the file from torch-fidelity's release page.")
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"],
                                              feature_extractor_weights_path=str(weights)).to(device)
    except Exception as error:
        raise InputError(f"The InceptionV3 weights '{weights}' cannot be loaded: "
                         f"{first_line(error)}") from None
    levels = [(from_pil(image) * 255).round().to(torch.uint8) for image in images]
    if len({image.shape for image in levels}) > 1:
        batch_size = 1  # images of several sizes: the network resizes them itself
    return torch.cat([network(torch.cat(levels[i:i + batch_size]).to(device))[0].float().cpu()
                      for i in range(0, len(levels), batch_size)])


def similarity(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Mean cosine similarity over all pairs of a generated and a real image's features.

    These are (N, D) and (M, D), and of unit length.
    """
    return (generated @ real.T).mean().item()


def pairwise_similarity(features: torch.Tensor) -> float:
    """Mean cosine similarity over all pairs of different images' features, (N, D) of unit length.

    InputError for N < 2.
    """
    n = len(features)
    if n < 2:
        raise InputError("The similarity of real images to each other needs at least two of them.")
    return ((features @ features.T).sum() - n).item() / (n * (n - 1))


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017); InputError for a set of one.
    The last trace is the sum of the singular values of X_a X_b^T for C = X^T X: a matrix of N x M numbers,
    without the root of a singular matrix.
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) < 2:
        raise InputError("A Frechet distance needs at least two images in each set.")
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    shared = torch.linalg.svdvals(x @ y.T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * shared).item()


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """KID: squared maximum mean discrepancy of two sets of features, (N, D) and (M, D).

    Unbiased, over all images at once, with the kernel (x . y / D + 1)^3 (Binkowski et al. 2018). InputError
    for a set of one.
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) < 2:
        raise InputError("A kernel distance needs at least two images in each set.")

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def among(x: torch.Tensor) -> torch.Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return (among(a) + among(b) - 2 * kernel(a, b).mean()).item()


@torch.no_grad()
def clip_scores(images: list[Image.Image], texts: Sequence[str], network: str, batch_size: int = 32,
                device: torch.device | str = "cpu") -> torch.Tensor:
    """CLIP scores (N,): 100 times the cosine of each image and its text, at least 0 (Hessel et al. 2021).

    The scale is that of torchmetrics. InputError for a network that is no CLIPModel.
    """
    from transformers import AutoTokenizer

    _, model = _load(str(network), str(device))
    if not hasattr(model, "text_projection"):
        raise InputError(f"The network '{network}' is no CLIPModel: it has no text encoder.")
    distinct = list(dict.fromkeys(texts))
    try:
        tokenizer = AutoTokenizer.from_pretrained(network, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"The tokenizer of '{network}' cannot be loaded: {first_line(error)}") from None
    ids = tokenizer(distinct, padding=True, truncation=True, return_tensors="pt",
                    max_length=model.config.text_config.max_position_embeddings).to(device)
    texts_of = model.text_projection(model.text_model(**ids).pooler_output).float().cpu()
    texts_of = torch.nn.functional.normalize(texts_of, dim=1)[[distinct.index(text) for text in texts]]
    images_of = image_features(images, network, batch_size, device, kind="generated image")
    return (100 * (images_of * texts_of).sum(1)).clamp(min=0)


def score_images(generated: list[Image.Image], real: list[Image.Image], texts: Sequence[str],
                 networks: Networks, metrics: Iterable[str] = METRICS,
                 device: torch.device | str = "cpu") -> dict[str, float]:
    """Scores of generated images, one of `texts` for each, against real (clean) images of the concept.

    "dino" is accompanied by "real_real", "attributes" by those of OF_CONCEPT; they are absent for a `dino`
    that cannot read them. A score is absent when a set has one image and it needs two. Warns then, and when
    FID or FD-DINOv2 is of few images. InputError for an unknown metric, and for a score that
    is not finite.
    """
    metrics, scores, sets = list(metrics), {}, {"clean image": real, "generated image": generated}
    if unknown := [name for name in metrics if name not in METRICS]:
        raise InputError(f"Unknown metrics {', '.join(unknown)}; choose from: {', '.join(METRICS)}.")
    if min(len(real), len(generated)) < 2 and (alone := [name for name in metrics if name in SET_METRICS]):
        warnings.warn(f"No {', '.join(alone)}: that needs at least two clean and two generated images, but "
                      f"there are {len(real)} and {len(generated)}.", stacklevel=2)
        metrics = [name for name in metrics if name not in SET_METRICS]
    if {"dino", "attributes", "fd_dino"} & set(metrics):
        theirs, ours = (image_features(images, networks.dino, device=device, normalized=False, kind=kind)
                        for kind, images in sets.items())
        if "dino" in metrics:
            units = [torch.nn.functional.normalize(f, dim=1) for f in (ours, theirs)]
            scores["dino"] = similarity(*units)
            if len(real) > 1:
                scores["real_real"] = pairwise_similarity(units[1])
        if "attributes" in metrics and can_read(networks.dino):
            scores |= attribute_scores(ours, theirs, networks.dino)
        if "fd_dino" in metrics:
            scores["fd_dino"] = frechet_distance(ours, theirs)
    if {"fid", "kid"} & set(metrics):
        theirs, ours = (inception_features(images, networks.inception, device=device) if networks.inception
                        else image_features(images, networks.clip, device=device, normalized=False, kind=kind)
                        for kind, images in sets.items())
        scores |= {"fid": frechet_distance(ours, theirs)} if "fid" in metrics else {}
        scores |= {"kid": kernel_distance(ours, theirs)} if "kid" in metrics else {}
    if {"fid", "fd_dino"} & set(metrics) and min(len(real), len(generated)) < FEW_IMAGES:
        warnings.warn(f"FID and FD-DINOv2 rest on {len(generated)} generated and {len(real)} real images: "
                      f"with fewer than {FEW_IMAGES} their values depend mostly on the number of images, so "
                      "compare them only at equal numbers.", stacklevel=2)
    if "clip" in metrics:
        scores["clip"] = clip_scores(generated, texts, networks.clip, device=device).mean().item()
    if broken := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise InputError(f"The score '{broken[0]}' is not finite; give other images or networks.")
    return scores

"""How well generated pictures show the concept:
cosine similarity of image-encoder features (paper Sec. 5.1.3).

Always read a similarity beside its anchor, that of the real pictures among themselves:
more than that is copying.
"""

import torch
from PIL import Image

from .errors import InputError

__all__ = ["image_features", "pairwise_similarity", "similarity"]


@torch.no_grad()
def image_features(images: list[Image.Image], network: str, batch_size: int = 32,
                   device: torch.device | str = "cpu") -> torch.Tensor:
    """Unit-length CLS features (N, D) of a Dinov2Model folder or Hub id,
    each picture prepared as its processor says."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor, model = AutoImageProcessor.from_pretrained(network), AutoModel.from_pretrained(network)
    except (OSError, ValueError) as error:
        raise InputError(f"The image encoder '{network}' cannot be loaded: "
                         f"{str(error).splitlines()[0]}") from None
    model.eval().to(device)
    features = [model(**processor(images[i:i + batch_size], return_tensors="pt").to(device)).pooler_output
                for i in range(0, len(images), batch_size)]
    return torch.nn.functional.normalize(torch.cat(features).float(), dim=1).cpu()


def similarity(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Mean cosine similarity over all pairs of a generated and a real picture's features,
    (N, D) and (M, D)."""
    return (generated @ real.T).mean().item()


def pairwise_similarity(features: torch.Tensor) -> float:
    """Mean cosine similarity over all pairs of different pictures, (N, D):
    the real-real anchor; needs N >= 2."""
    n = len(features)
    if n < 2:
        raise InputError("The similarity among real pictures needs at least two of them.")
    return ((features @ features.T).sum() - n).item() / (n * (n - 1))

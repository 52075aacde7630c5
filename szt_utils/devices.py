"""The device and the precision that the scripts compute with."""

import torch

__all__ = ["best_device", "dtype_of"]


def best_device() -> torch.device:
    """The current GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(mixed_precision: str) -> torch.dtype:
    """The dtype of `--mixed_precision`: "no", "fp16" or "bf16"."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]

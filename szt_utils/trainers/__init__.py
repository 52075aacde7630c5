"""The trainers for which export_dataset.py writes data sets: one file each, an entry in `TRAINERS`."""

from .ai_toolkit import AI_TOOLKIT
from .diffusers import DIFFUSERS
from .diffusion_pipe import DIFFUSION_PIPE
from .kohya import KOHYA
from .musubi import MUSUBI
from .onetrainer import ONETRAINER
from .simpletuner import SIMPLETUNER

__all__ = ["TRAINERS"]

TRAINERS = {trainer.name: trainer for trainer in (
    KOHYA, ONETRAINER, AI_TOOLKIT, SIMPLETUNER, DIFFUSION_PIPE, MUSUBI, DIFFUSERS)}

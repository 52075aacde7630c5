"""The process side of a training run: accelerator, devices, ranks, the optimizer's step."""

import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch

from .devices import dtype_of
from .errors import InputError
from .models import Condition, Model, find_family
from .settings import TrainingSettings

__all__ = ["Run"]

T = TypeVar("T")


class Run:
    """Accelerate's state for training `count` concepts: one by all processes together, or several dealt out.

    `rank` and `num_ranks` are those of the processes that train a concept together.
    """

    def __init__(self, settings: TrainingSettings, count: int):
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        self.settings, self.together = settings, count == 1
        folder = Path(settings.output_dir)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a missing tracker is reported by `describe_trackers`
                self.accelerator = Accelerator(
                    gradient_accumulation_steps=settings.gradient_accumulation_steps,
                    mixed_precision=settings.mixed_precision,
                    log_with=None if settings.report_to == "none" else settings.report_to,
                    project_config=ProjectConfiguration(project_dir=str(folder),
                                                        logging_dir=str(folder / settings.logging_dir)))
        except ValueError as error:
            raise InputError(f"--mixed_precision {settings.mixed_precision} or --report_to "
                             f"{settings.report_to} cannot be used here: {error}") from None
        self.process, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes
        self.rank, self.num_ranks = (self.process, self.num_processes) if self.together else (0, 1)
        self.device, self.dtype = self.accelerator.device, dtype_of(self.accelerator.mixed_precision)
        self._quiet()

    def _quiet(self) -> None:
        import diffusers
        import transformers

        for library in (transformers, diffusers):
            if not self.accelerator.is_main_process:
                library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()

    def share(self, concepts: list[T]) -> list[T]:
        """The concepts that this process trains: the one of all processes, or its part of several."""
        return concepts if self.together else concepts[self.process::self.num_processes]

    def agree(self, seed: int) -> int:
        """The seed of rank 0, when all processes train one concept together; else this process's own."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([seed])[0] if self.together and self.num_ranks > 1 else seed

    def new_seed(self) -> int:
        """A seed nobody has chosen, the same on all ranks."""
        return self.agree(int.from_bytes(os.urandom(4), "little"))

    def barrier(self) -> None:
        """Wait for the other ranks of this concept."""
        if self.num_ranks > 1:
            self.accelerator.wait_for_everyone()

    def load_model(self) -> Model:
        """The frozen model, as the training needs it: text encoders in float32, the rest in its precision."""
        settings = self.settings
        family = find_family(settings.pretrained_model_name_or_path, settings.revision)
        if family.no_training:
            raise InputError(family.no_training)
        model = family.load(settings.pretrained_model_name_or_path, dtype=self.dtype, device=self.device,
                            revision=settings.revision, variant=settings.variant,
                            tokenizer=settings.tokenizer_name, text_dtype=torch.float32,
                            quantize=settings.quantize)
        if model.t5 is not None:
            model.t5.known = {}  # captions come again and again
        model.clip_skip = settings.clip_skip
        model.pooled_token = settings.pooled_token  # of SDXL; the others have none
        if settings.gradient_checkpointing:
            model.network.train()  # checkpointing is off in evaluation mode
            model.network.enable_gradient_checkpointing()
            for encoder in model.text_encoders:
                encoder.gradient_checkpointing_enable()
        if settings.enable_xformers_memory_efficient_attention:
            try:
                model.network.enable_xformers_memory_efficient_attention()
            except (ImportError, ModuleNotFoundError, ValueError) as error:
                raise InputError("--enable_xformers_memory_efficient_attention cannot be used here: "
                                 f"{error}") from None
        if settings.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        if settings.compile:
            self._compile(model)
        if settings.resolution < model.vae_scale_factor:
            raise InputError(f"--resolution must be at least {model.vae_scale_factor}, one cell of this "
                             f"model's latent grid, but is {settings.resolution}.")
        cell = model.vae_scale_factor * model.patch
        if model.patch > 1 and settings.resolution % cell:
            raise InputError(f"--resolution must be a multiple of {cell} for this model, but is "
                             f"{settings.resolution}.")
        return model

    def _compile(self, model: Model) -> None:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=self.device))
        except RuntimeError as error:  # no compiler, mostly
            raise InputError(f"--compile cannot be used here: {str(error).splitlines()[0]}") from None
        for network in (model.network, *model.text_encoders):
            network.compile()

    def condition(self, model: Model, ids: list[torch.Tensor], sizes: torch.Tensor | None) -> Condition:
        """The model's condition, from text encoders in float32 under autocast; gradients flow."""
        with self.accelerator.autocast():
            return model.condition(ids, sizes)

    def optimizer(self, rows: list[torch.nn.Parameter]) -> tuple[Any, Any]:
        """AdamW on the rows, and the schedule of its learning rate."""
        from diffusers.optimization import get_scheduler

        settings = self.settings
        optimizer = torch.optim.AdamW(
            rows, lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay, eps=settings.adam_epsilon)
        schedule = get_scheduler(settings.lr_scheduler, optimizer,
                                 num_warmup_steps=settings.lr_warmup_steps,
                                 num_training_steps=settings.max_train_steps,
                                 num_cycles=settings.lr_num_cycles)
        return self.accelerator.prepare(optimizer), schedule

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, optimizer: Any, schedule: Any, rows: list[torch.nn.Parameter]) -> None:
        """Average the rows' gradients over the ranks and take one step of the optimizer and the schedule."""
        for part in rows if self.num_ranks > 1 else []:
            part.grad = self.accelerator.reduce(part.grad, "mean")
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:
            schedule.step()

    def start_trackers(self, options: dict[str, Any]) -> None:
        """Hand the settings to the trackers of --report_to."""
        self.accelerator.init_trackers("textual_inversion", config={
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in options.items()})

    def describe_trackers(self) -> list[str]:
        """A line about trackers that are not installed, if there is one to print."""
        return [] if self.accelerator.log_with or self.settings.report_to == "none" else [
            f"no tracker for --report_to {self.settings.report_to} is installed: the losses go to "
            "stats.jsonl only"]

    def end(self) -> None:
        self.accelerator.end_training()

    def evaluation(self) -> AbstractContextManager:
        """Autocast for generating images, in the precision of the networks."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

"""The process side of a training run: accelerator, devices, ranks, signals, the optimizer's step."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from .checkpoints import find_checkpoint, load_shared_state
from .devices import dtype_of
from .errors import InputError, file_error
from .fingerprint import hash_t5, hash_weights
from .models import Model, find_family
from .settings import ConceptSettings, TrainingSettings
from .square_images import check_size

__all__ = ["Run"]

T = TypeVar("T")


class Run:
    """Accelerate's state for training `count` concepts: one by all processes together, or several dealt out.

    `rank` and `num_ranks` are those of the processes that train a concept together. `failures` holds a
    message for each concept that failed, by its output folder, `stopped` the signal that ended the run early.
    A context that ends with an InputError for the failures, and holds `resources` until then.
    """

    def __init__(self, settings: TrainingSettings, count: int):
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

        self.settings, self.one_concept = settings, count == 1
        self.failures: dict[str, str] = {}
        self.stopped: signal.Signals | None = None
        self.resources = ExitStack()
        folder = Path(settings.output_dir)
        # Processes with concepts of their own meet at the end only.
        patience = [] if self.one_concept else [InitProcessGroupKwargs(timeout=timedelta(days=365))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a missing tracker is reported by `start_trackers`
                self.accelerator = Accelerator(
                    gradient_accumulation_steps=settings.gradient_accumulation_steps,
                    mixed_precision=settings.mixed_precision, kwargs_handlers=patience,
                    log_with=None if settings.report_to == "none" else settings.report_to or "tensorboard",
                    project_config=ProjectConfiguration(project_dir=str(folder),
                                                        logging_dir=str(folder / settings.logging_dir)))
        except ValueError as error:
            raise InputError(f"--mixed_precision {settings.mixed_precision} or --report_to "
                             f"{settings.report_to} cannot be used here: {error}") from None
        scaler = self.accelerator.scaler
        self.first_scaler_state = None if scaler is None else scaler.state_dict()
        self.process, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > self.num_processes:
            raise InputError(f"{started} processes were started, but Accelerate sees {self.num_processes}: "
                             "on a CPU, set the environment variable ACCELERATE_USE_CPU=1.")
        self.rank, self.num_ranks = (self.process, self.num_processes) if self.one_concept else (0, 1)
        self.device, self.dtype = self.accelerator.device, dtype_of(self.accelerator.mixed_precision)
        self._quiet()

    def _quiet(self) -> None:
        import diffusers
        import transformers

        for library in (transformers, diffusers):
            if not self.accelerator.is_main_process:
                library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.resources.close()
        if kind is not None:
            return
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
        if not self.one_concept and not self.stopped:
            self.accelerator.wait_for_everyone()  # launchers end all processes when one reports a failure
        self.accelerator.end_training()
        if self.stopped:
            print("Stopped. To continue, repeat the command with --resume_from_checkpoint latest.",
                  file=sys.stderr)
            sys.exit(128 + self.stopped)
        if self.failures:
            raise InputError(" ".join(self.failures.values()))

    def share(self, concepts: list[T]) -> list[T]:
        """The concepts that this process trains: the one of all processes, or its part of several."""
        return concepts if self.one_concept else concepts[self.process::self.num_processes]

    def broadcast(self, seed: int) -> int:
        """The seed of rank 0, when all processes train one concept together; else this process's own."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([seed])[0] if self.one_concept and self.num_ranks > 1 else seed

    def seed_of(self, concept: ConceptSettings) -> int:
        """The seed of --seed, of the run that is resumed, or a new one; the same on all ranks."""
        if concept.seed is not None:
            return concept.seed
        name = self.settings.resume_from_checkpoint
        found = find_checkpoint(concept.output_dir, name) if name else None
        recorded = load_shared_state(found)["fingerprint"].get("seed") if found else None
        return self.broadcast(int.from_bytes(os.urandom(4), "little")) if recorded is None else recorded

    @contextmanager
    def surviving(self, concept: ConceptSettings) -> Iterator[None]:
        """Record an InputError or OSError of one of several concepts in `failures`; raise a single one's."""
        try:
            yield
        except (InputError, OSError) as error:
            if self.one_concept:
                raise
            named = isinstance(error, OSError) and error.filename
            self.fail(concept, file_error(error) if named else str(error))

    def survivors(self, concepts: list[Any]) -> list[Any]:
        """The `Concept`s that have not failed."""
        return [each for each in concepts if each.settings.output_dir not in self.failures]

    def fail(self, concept: ConceptSettings, message: str) -> None:
        """Note that a concept failed; of several, say so at once."""
        from tqdm.auto import tqdm

        if not self.one_concept:
            message = f"{Path(concept.output_dir).name}: {message}"
            tqdm.write(f"{message} The other concepts continue.", file=sys.stderr)
        self.failures[concept.output_dir] = message

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after its step, which saves a checkpoint; a second one at once."""
        def stop(number: int, _: Any) -> None:
            # With several ranks, the launcher passes on a signal that the terminal sent as well.
            if self.stopped is None or self.num_ranks > 1:
                self.stopped = self.stopped or signal.Signals(number)
                print(f"{self.stopped.name}: stopping after this step.", file=sys.stderr)
            else:
                # A shell's background jobs ignore Ctrl-C: a second one that is sent to them counts as well.
                ignored = before[number] == signal.SIG_IGN
                signal.signal(number, signal.default_int_handler if ignored else before[number])
                signal.raise_signal(number)

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # signals reach the main thread only
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stopping(self) -> bool:
        """Whether the run must end after this step, on all ranks; all must ask."""
        asked = self.any_rank(self.stopped is not None)
        if asked:
            self.stopped = self.stopped or signal.SIGTERM
        return asked  # not what has come since on this rank

    def any_rank(self, value: bool) -> bool:
        """Whether this is so on any rank of this concept; all must ask."""
        if self.num_ranks == 1:
            return value
        flag = torch.tensor(float(value), device=self.device)
        return self.accelerator.reduce(flag, "sum").item() > 0

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
        model = family.load(settings.pretrained_model_name_or_path, dtype=self.dtype,
                            device="cpu" if settings.offload else self.device,
                            revision=settings.revision, variant=settings.variant,
                            tokenizer=settings.tokenizer_name, text_dtype=torch.float32,
                            text_linear=self.dtype if self._autocasts() else None,
                            quantize=settings.quantize)
        if model.pooled_token is not None:
            model.pooled_token = settings.pooled_token
        elif (settings.pooled_token, settings.micro_conditioning) != ("upstream", "crop"):
            raise InputError(f"--pooled_token and --micro_conditioning are of SDXL; this is {model.family}.")
        layers = min(encoder.config.num_hidden_layers for encoder in model.text_encoders)
        if settings.clip_skip >= layers:
            raise InputError(f"--clip_skip must be below {layers}, the number of the text encoder's layers, "
                             f"but is {settings.clip_skip}.")
        model.clip_skip = settings.clip_skip
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
        self.weights_hash, self.t5_hash = hash_weights(model), hash_t5(model)
        if settings.compile:
            self._compile(model)
        if settings.resolution < model.vae_scale_factor:
            raise InputError(f"--resolution must be at least {model.vae_scale_factor}, one cell of this "
                             f"model's latent grid, but is {settings.resolution}.")
        cell = model.vae_scale_factor * model.patch
        if model.patch > 1 and settings.resolution % cell:
            raise InputError(f"--resolution must be a multiple of {cell} for this model, but is "
                             f"{settings.resolution}.")
        check_size(model, settings.resolution, settings.resolution)
        return model

    def _autocasts(self) -> bool:
        with self.accelerator.autocast():
            return torch.is_autocast_enabled(self.device.type)

    def _compile(self, model: Model) -> None:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=self.device))
        except RuntimeError as error:  # no compiler, mostly
            raise InputError(f"--compile cannot be used here: {str(error).splitlines()[0]}") from None
        for network in (model.network, *model.text_encoders):
            network.compile()

    def make_optimizer(self, rows: list[torch.nn.Parameter]) -> tuple[Any, Any]:
        """AdamW on the rows, and the scheduler of its learning rate."""
        from diffusers.optimization import get_scheduler

        settings = self.settings
        optimizer = torch.optim.AdamW(
            rows, lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay, eps=settings.adam_epsilon)
        lr_scheduler = get_scheduler(settings.lr_scheduler, optimizer,
                                     num_warmup_steps=settings.lr_warmup_steps,
                                     num_training_steps=settings.max_train_steps,
                                     num_cycles=settings.lr_num_cycles)
        return self.accelerator.prepare(optimizer), lr_scheduler

    def step(self, optimizer: Any, lr_scheduler: Any, rows: list[torch.nn.Parameter]) -> None:
        """Average the rows' gradients over the ranks, then step the optimizer and the learning rate."""
        for part in rows if self.num_ranks > 1 else []:
            part.grad = self.accelerator.reduce(part.grad, "mean")
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:
            lr_scheduler.step()

    def start_trackers(self, options: dict[str, Any]) -> None:
        """Hand the settings to the trackers of --report_to."""
        if self.settings.report_to not in (None, "none") and not self.accelerator.log_with:
            print(f"No tracker for --report_to {self.settings.report_to} is installed: the losses go to "
                  "stats.jsonl only.")
        self.accelerator.init_trackers("textual_inversion", config={
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in options.items()})
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb" and self.accelerator.is_main_process:
                tracker.tracker.define_metric("*", step_metric="step")

    def log(self, values: dict[str, Any], step: int) -> None:
        """Hand values to the trackers of --report_to.

        wandb counts by itself, since it drops what comes for an earlier step, as of a second group.
        """
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log({**values, "step": step})
            else:
                tracker.log(values, step=step)

    def evaluation(self) -> AbstractContextManager:
        """Autocast for generating images, in the precision of the networks."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

"""What a training step costs, counted rather than timed:
a slow machine must not fail it, a regression must."""

import pytest
import torch
from conftest import flags, run_here
from torch.utils._python_dispatch import TorchDispatchMode

from szt_utils.embedding_files import load_embedding

READ = torch.ops.aten._local_scalar_dense.default  # the host waits for a value


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is read by Python."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is READ
        return function(*args, **(kwargs or {}))


def costs(monkeypatch, model, images, folder, **changes) -> dict[str, int]:
    """Calls of the networks and values read during one run."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    counts = {}

    def counted(cls, name):
        original = getattr(cls, name)

        def call(self, *args, **kwargs):
            counts[cls.__name__] = counts.get(cls.__name__, 0) + 1
            return original(self, *args, **kwargs)
        monkeypatch.setattr(cls, name, call)

    counted(UNet2DConditionModel, "forward")
    counted(AutoencoderKL, "encode")
    counted(CLIPTextModel, "forward")
    with Reads() as reads:
        run_here(flags(model, images, folder, **changes))
    monkeypatch.undo()
    return {**counts, "reads": reads.count}


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_one_call_of_each_network_and_waits_for_no_value(monkeypatch, tiny_model, concept_folder,
                                                                   tmp_path, masked):
    """The difference of 20 and 40 steps: one U-Net and one text encoder a step, the VAE never again.

    Of values, one per sample (is it mirrored?) and AdamW's count of steps, both on the CPU on any machine,
    and one per ten steps (is the embedding finite?).
    """
    batch_size = 2
    short, long = (costs(monkeypatch, tiny_model, concept_folder[0], tmp_path / str(steps),
                         max_train_steps=steps, train_batch_size=batch_size, repeats=100,
                         loss_mask_dir=concept_folder[1] if masked else None)
                   for steps in (20, 40))
    assert short["UNet2DConditionModel"] == short["CLIPTextModel"] == 20
    assert long["UNet2DConditionModel"] == long["CLIPTextModel"] == 40
    assert short["AutoencoderKL"] == long["AutoencoderKL"] == 2 * 5 / batch_size
    assert 20 * batch_size <= long["reads"] - short["reads"] <= 20 * (batch_size + 1) + 2


def test_without_the_cache_the_vae_runs_at_every_step(monkeypatch, tiny_model, concept_folder, tmp_path):
    """What the cache saves; and that the counter sees it."""
    assert costs(monkeypatch, tiny_model, concept_folder[0], tmp_path, max_train_steps=7,
                 no_cache_latents=True)["AutoencoderKL"] == 7


def test_several_concepts_share_every_call_of_the_networks(monkeypatch, tiny_model, concept_folder, tmp_path):
    import json

    (tmp_path / "concepts.json").write_text(json.dumps([
        {"placeholder_token": f"<{i}>", "initializer_token": "star"} for i in range(4)]))
    counts = costs(monkeypatch, tiny_model, concept_folder[0], tmp_path / "out", max_train_steps=6,
                   placeholder_token=None, initializer_token=None, concepts=tmp_path / "concepts.json")
    assert counts["UNet2DConditionModel"] == counts["CLIPTextModel"] == 6
    # An image's latents are encoded for every concept that shows it: their JPEG or masks may differ.
    assert counts["AutoencoderKL"] == 4 * 3


def test_processes_exchange_the_rows_gradient_and_nothing_else(monkeypatch, tiny_model, concept_folder,
                                                               tmp_path):
    """As one of two processes would: what it sends in a step is the gradient of two rows of 32 numbers and
    whether to stop, and now and then whether all is well."""
    from accelerate import Accelerator

    sent = []

    def reduce(self, tensor, reduction):
        sent.append((tensor.numel() * tensor.element_size(), reduction))
        return tensor

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "reduce", reduce)
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: None)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda objects: objects)
    run_here(flags(tiny_model, concept_folder[0], tmp_path, num_vectors=2, max_train_steps=5,
                   gradient_accumulation_steps=2))
    assert [size for size, reduction in sent if reduction == "mean"] == [2 * 32 * 4] * 5
    rest = [size for size, reduction in sent if reduction == "sum"]
    assert 5 <= len(rest) <= 7 and max(rest) <= 4
    assert load_embedding(tmp_path / "learned_embeds.safetensors")[1].shape == (2, 32)


def test_a_checkpoint_is_small(tiny_model, concept_folder, tmp_path):
    """The rows, their two moments and the random state; upstream writes the text encoder and two moments of
    its whole embedding."""
    run_here(flags(tiny_model, concept_folder[0], tmp_path, max_train_steps=2, checkpointing_steps=2))
    assert sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir()) < 60_000

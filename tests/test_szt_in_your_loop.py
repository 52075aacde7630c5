"""The example loop with the bundled model: four marked lines, and a LoRA that a pipeline loads."""

import importlib.util

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

EXAMPLE = ROOT / "examples" / "szt_in_your_loop.py"


def test_the_example_is_short_and_its_method_is_four_marked_lines():
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) <= 150
    calls = ("zone.transform(", "SafeZone.paper(", "zone.timesteps(", "zone.loss(")
    marked = [line for line in lines if line.endswith("# SZT")]
    assert all(call in line for call, line in zip(calls, marked, strict=True))


def test_the_example_trains_a_lora_in_the_safe_zone(concept_folder, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("szt_in_your_loop", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    images, masks = concept_folder
    drawn, real = [], example.SafeZone.timesteps
    monkeypatch.setattr(example.SafeZone, "timesteps", lambda *args, **options: (
        drawn.append(real(*args, **options)) or drawn[-1]))
    learned = {}
    for name, more in (("szt", ["--szt"]), ("nominal", [])):
        example.main(["--image_dir", str(images), "--mask_dir", str(masks), "--prompt", "a photo of a star",
                      "--output_dir", str(tmp_path / name), "--resolution", "64", "--steps", "3",
                      "--batch_size", "2", *more])
        learned[name] = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
    assert torch.cat(drawn[:3]).min() >= 500 and len(drawn) == 6
    assert all(tensor.isfinite().all() for tensor in learned["szt"].values())
    up = [name for name in learned["szt"] if "lora.up" in name or "lora_B" in name]
    assert up and any(learned["szt"][name].any() for name in up)  # begins at 0: it has learned
    assert any(not torch.equal(learned["szt"][name], learned["nominal"][name]) for name in up)

    from diffusers import StableDiffusionPipeline

    from szt_utils import pocket

    pipeline = StableDiffusionPipeline.from_pretrained(pocket.model_path())
    pipeline.load_lora_weights(tmp_path / "szt")
    assert pipeline.get_active_adapters()

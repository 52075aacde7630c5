"""Other methods on the pocket world: what each trains, when and where, and that a table of them resumes."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from szt_utils import pocket
from szt_utils.models import load_model, residual, tokenize
from szt_utils.safe_zone import SafeZone
from szt_utils.tables import read_cells

pytest.importorskip("peft")
STAR = "teal-striped-star"


@pytest.fixture
def methods(monkeypatch):
    """The example, with few images of the class and few steps."""
    spec = importlib.util.spec_from_file_location("methods", ROOT / "examples" / "methods.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "methods", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CLASS_IMAGES", 2)
    monkeypatch.setattr(module, "HELD_OUT_IMAGES", 2)
    real = module.CellSettings
    monkeypatch.setattr(module, "CellSettings", lambda **given: real(**given | {"num_inference_steps": 1}))
    return module


@pytest.fixture
def entry(tmp_path):
    """An entry of a training: images, masks and a seed, without a defence."""
    pocket.write_concept(STAR, tmp_path / "images", tmp_path / "masks", count=2)
    return {"train_data_dir": str(tmp_path / "images"), "seed": 0}


def settings(methods, name, **given):
    table = methods.read_table(methods.parse_args(["--method", name]))
    return replace(table.settings, steps=2, **given)


def prediction(model, timestep=700):
    """What the network predicts for a fixed input."""
    noised = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = model.condition(tokenize(model, "a photo of a sks object"))
    with torch.no_grad():
        return model.predict(noised, torch.tensor([timestep]), condition)


@pytest.mark.parametrize("name, trained, shares", [
    ("lora", "lora_", 0.02), ("dreambooth", "", 1.0), ("custom_diffusion", ".attn2.to_", 0.02)])
def test_a_method_trains_its_own_parameters_and_no_others(methods, entry, name, trained, shares):
    one = methods.Trained(methods.METHODS[name], pocket.model_path())
    frozen = {key: value.clone() for key, value in one.model.network.named_parameters()
              if not value.requires_grad}
    before = {key: value.detach().clone() for key, value in one.parameters.items()}
    assert all(trained in key for key in before if key != "token")
    assert ("token" in before) == (name == "custom_diffusion")
    count = sum(value.numel() for value in before.values())
    assert 0 < count / sum(value.numel() for value in one.model.network.parameters()) <= 2 * shares
    methods.train_one(one, settings(methods, name), entry)
    assert all((value != before[key]).any() for key, value in one.parameters.items())
    assert all(torch.equal(value, frozen[key]) for key, value in one.model.network.named_parameters()
               if key in frozen)


def test_a_lora_starts_from_its_seed_whatever_was_drawn_before(methods, monkeypatch, tmp_path):
    entries = [{"seed": seed, "output_dir": str(tmp_path / str(i))} for i, seed in enumerate((3, 3, 4))]
    monkeypatch.setattr(methods, "training_entries", lambda *given: (entries, []))
    monkeypatch.setattr(methods, "train_one", lambda *given: torch.rand(5))
    table = methods.read_table(methods.parse_args(["--method", "lora", "--output_dir", str(tmp_path)]))
    methods.trainer("lora")(table, SimpleNamespace(name=STAR), [])
    first, again, other = (load_file(tmp_path / str(i) / table.learned_file) for i in range(3))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", ["lora", "dreambooth", "custom_diffusion"])
def test_what_is_learned_is_what_is_loaded(methods, entry, name, tmp_path):
    one, other = (methods.Trained(methods.METHODS[name], pocket.model_path()) for _ in range(2))
    methods.train_one(one, settings(methods, name), entry)
    one.save(tmp_path / "weights.safetensors")
    assert not torch.equal(prediction(one.model), prediction(other.model))
    other.load(tmp_path / "weights.safetensors")
    assert torch.equal(prediction(one.model), prediction(other.model))


@pytest.mark.parametrize("name, flags, everywhere", [
    ("lora", {}, False), ("lora", {"prior": True}, True), ("dreambooth", {}, True)])
def test_class_images_have_all_timesteps_and_no_mask(methods, entry, name, flags, everywhere, monkeypatch):
    drawn, losses = [], []
    timesteps, loss = SafeZone.timesteps, SafeZone.loss
    monkeypatch.setattr(SafeZone, "timesteps", lambda *given, **options: (
        drawn.append(timesteps(*given, **options)) or drawn[-1]))

    def record(zone, prediction, target, masks, prior_preservation):
        prediction.retain_grad()
        losses.append((prediction, masks))
        return loss(zone, prediction, target, masks, prior_preservation=prior_preservation)

    monkeypatch.setattr(SafeZone, "loss", record)
    masks = {"loss_mask_dir": str(Path(entry["train_data_dir"]).parent / "masks")}
    methods.train_one(methods.Trained(methods.METHODS[name], pocket.model_path()),
                      settings(methods, name, train_batch_size=16), {**entry, **flags, **masks, "szt": True})
    own, rest = (torch.cat(each) for each in zip(*((t[:16], t[16:]) for t in drawn), strict=True))
    assert own.min() >= 500
    assert (len(rest) > 0 and rest.min() < 300) if everywhere else not len(rest)
    prediction, mask = losses[0]
    outside = torch.nn.functional.interpolate(mask, (16, 16), mode="area")[:16] == 0
    assert outside.any() and not prediction.grad[:16].abs().amax(1, keepdim=True)[outside].any()
    assert prediction.grad[16:].all() or not everywhere


def test_a_lora_is_off_below_the_threshold(methods, entry):
    one = methods.Trained(methods.METHODS["lora"], pocket.model_path())
    plain = load_model(pocket.model_path())
    methods.train_one(one, settings(methods, "lora", learning_rate=0.1), entry)
    network = one.pipeline(off_below=500).unet
    states = plain.condition(tokenize(plain, "a photo of a sks object"))["states"]
    noised = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        for timestep, off in ((700, False), (300, True), (500, False), (499, True)):
            pair = [each(noised, torch.tensor(timestep), encoder_hidden_states=states).sample
                    for each in (network, plain.network)]
            assert torch.equal(*pair) == off, timestep


def test_class_losses_are_of_either_half_of_the_timesteps(methods, monkeypatch):
    seen = []
    monkeypatch.setattr(methods, "residual", lambda *given: seen.append(given[3]) or residual(*given))
    low, high = methods.class_losses(load_model(pocket.model_path()))
    assert seen[0].max() < 500 <= seen[1].min() and low > high > 0


@pytest.mark.parametrize("name", ["lora", "custom_diffusion"])
def test_a_table_is_made_once(methods, tmp_path, name, capsys):
    flags = ["--method", name, "--output_dir", str(tmp_path), "--concepts", STAR, "--data", "clean",
             "--defences", "nominal", "szt", "--steps", "1"]
    methods.main(flags)
    cells = read_cells(tmp_path)
    assert [cell.defence for cell in cells] == ["nominal", "szt"]
    assert all({"dino", "attributes", "low_t", "high_t"} <= set(cell.metrics) for cell in cells)
    assert (tmp_path / f"{name}.md").is_file() and (tmp_path / "sheets" / f"{name}-{STAR}.jpg").is_file()
    lines = (tmp_path / "cells" / f"{STAR}.jsonl").read_text()
    methods.main(flags)
    assert "2 cells, 0 of them to do." in capsys.readouterr().out
    assert (tmp_path / "cells" / f"{STAR}.jsonl").read_text() == lines


def test_methods_share_poisoned_images_but_no_results(methods, tmp_path):
    lora, dreambooth, inversion = (methods.read_table(methods.parse_args(
        ["--method", name, "--output_dir", str(tmp_path)])) for name in ("lora", "dreambooth",
                                                                         "textual_inversion"))
    cell = methods.Cell("adm+", "szt", STAR, 0)
    assert lora.home(STAR) == dreambooth.home(STAR) == inversion.home(STAR)
    assert len({table.learned(cell) for table in (lora, dreambooth, inversion)}) == 3
    assert len({table.generated(cell) for table in (lora, dreambooth, inversion)}) == 3


def test_a_missing_peft_is_told(methods, monkeypatch, tmp_path):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="error: LoRA needs peft: pip install peft"):
        methods.main(["--method", "lora", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_drift_preset_is_for_lora(methods, capsys):
    with pytest.raises(SystemExit) as stop:
        methods.parse_args(["--method", "dreambooth", "--preset", "drift"])
    assert stop.value.code == 2 and "--method lora" in capsys.readouterr().err

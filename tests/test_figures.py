"""The figures' scripts: their claims against closed forms, and every one of them from pictures to picture."""

import importlib
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from szt_utils.embeddings import save_embedding
from szt_utils.pocket import write_concept

FIGURES = {"fig2": ["--timesteps", 500, "--replacements", 2, "--pictures", 1],
           "fig3": ["--timesteps", 300, 700, "--replacements", 2, "--pictures", 1],
           "fig4": ["--timesteps", 3], "fig5": ["--timesteps", 3, "--draws", 1],
           "fig6": ["--steps", 1, 2, "--draws", 1], "fig7": [], "spectra": ["--bands", 4]}
CONCEPTS = ("teal-striped-star", "red-dotted-heart")


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "figures"))
    yield importlib.import_module
    for name in ("world", "roc", *FIGURES):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two concepts, clean and with noise for a poison, and embeddings as training would have left them."""
    folder, rng = tmp_path_factory.mktemp("figures"), np.random.default_rng(0)
    for concept in CONCEPTS:
        for path in write_concept(concept, folder / "clean" / concept, folder / "masks" / concept, count=2):
            pixels = np.asarray(Image.open(path)).astype(int) + rng.choice([-16, 16], (128, 128, 3))
            (folder / "adm+" / concept).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "adm+" / concept / path.name)
        for data in ("clean", "adm+"):
            home = folder / "learned" / data / concept
            home.mkdir(parents=True)
            for name in ("learned_embeds", "learned_embeds-steps-1", "learned_embeds-steps-2"):
                save_embedding(home / f"{name}.safetensors", "<concept>", torch.randn(1, 32))
    return folder


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_goes_from_pictures_to_json_to_picture(name, module, monkeypatch, data_dir, tiny_model,
                                                            tmp_path, capsys):
    def run():
        command = [f"{name}.py", "--pretrained_model_name_or_path", tiny_model, "--data_dir", data_dir,
                   "--output_dir", tmp_path, *FIGURES[name]]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        runpy.run_path(str(ROOT / "examples" / "figures" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    said = run()
    found = json.loads((tmp_path / f"{name}_claims.json").read_text())
    assert len(said) == len(found) > 2
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert list(results) == (["clean"] if name == "fig2" else ["clean", "adm+"])
    assert len(np.unique(np.asarray(Image.open(tmp_path / f"{name}.png")))) > 20
    # Again from the JSON alone, without a model.
    (tmp_path / f"{name}.png").unlink()
    monkeypatch.setattr("szt_utils.sensitivity.PromptedModel.load", None)
    assert run() == said and (tmp_path / f"{name}.png").exists()


def test_fig4_finds_the_timestep_below_which_the_increase_lies(module):
    timesteps = list(range(0, 1000, 50))
    clean = np.tile(np.linspace(1, 0.01, 20), (30, 1))
    poisoned = clean.copy()
    poisoned[:, :10] *= 2  # at t < 500 only
    results = {name: {"timesteps": timesteps, "losses": losses.tolist(), "names": [str(i) for i in range(30)]}
               for name, losses in (("clean", clean), ("adm+", poisoned))}
    found = module("fig4").claims(results)
    assert found["adm+: relative loss increase at t < 500"]["value"] == pytest.approx(1)
    assert found["adm+: relative loss increase at t >= 700"]["value"] == pytest.approx(0)
    share = np.cumsum(clean[0, :10]) / clean[0, :10].sum()
    wanted = np.interp(0.9, share, timesteps[:10])
    told = found["adm+: timestep below which 90 % of the loss change lies"]
    assert told["value"] == pytest.approx(wanted) and told["low"] == pytest.approx(told["high"])
    assert found["clean: Spearman correlation of median loss and timestep"] == pytest.approx(-1)


def test_fig6_compares_relative_reductions(module):
    losses = [[[0.2, 0.4], [0.1, 0.36]], [[0.4, 0.8], [0.2, 0.72]]]  # inside -50 %, outside -10 %
    found = module("fig6").claims({"clean": {"steps": [0, 10], "losses": losses}})
    assert found["clean: relative loss reduction inside"]["value"] == pytest.approx(0.5)
    assert found["clean: outside's reduction over inside's"]["value"] == pytest.approx(0.2)
    assert found["clean: outside's reduction over inside's"]["high"] == pytest.approx(0.2)


def test_fig7_moments_of_a_histogram_are_those_of_its_values(module):
    from szt_utils.evidence import bimodality, excess_kurtosis

    values = np.random.default_rng(0).choice([-16, -15, 0, 3, 16], 5000)
    counts = np.bincount(values + 64, minlength=129).astype(float)
    assert module("fig7").moments(counts) == pytest.approx((excess_kurtosis(values), bimodality(values)))


def test_the_area_under_the_roc_curve_of_two_diagnoses(module, monkeypatch, tmp_path, capsys):
    for name, scores in (("clean", [1, 2, 3, 4]), ("ea", [2.5, 5, 6, 7])):
        (tmp_path / name).mkdir()
        pictures = {f"photo-{i}.png": {"score": score} for i, score in enumerate(scores)}
        (tmp_path / name / "diagnosis.json").write_text(json.dumps({"pictures": pictures}))
    monkeypatch.setattr(sys, "argv", ["roc.py", "--clean", str(tmp_path / "clean"), "--poisoned",
                                      str(tmp_path / "ea"), "--output_dir", str(tmp_path)])
    module("roc").main()
    found = json.loads((tmp_path / "roc.json").read_text())
    assert found["ea"]["value"] == found["ea, photographs"]["value"] == pytest.approx(14 / 16)
    assert (tmp_path / "roc.png").exists() and "ea: 0.875" in capsys.readouterr().out


@pytest.mark.parametrize("folder,name", [(".", "fig4"), (".", "fig5"), (".", "fig6"), ("five", "fig4"),
                                         ("five", "spectra")])
def test_the_committed_claims_follow_from_the_committed_json(folder, name, monkeypatch, tmp_path, capsys):
    home = ROOT / "examples" / "figures" / "pocket" / folder
    (tmp_path / f"{name}.json").write_text((home / f"{name}.json").read_text())
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--redraw", "--output_dir", str(tmp_path)])
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "figures"))
    runpy.run_path(str(ROOT / "examples" / "figures" / f"{name}.py"), run_name="__main__")
    found, committed = (json.loads((where / f"{name}_claims.json").read_text()) for where in (tmp_path, home))
    assert found.keys() == committed.keys() and len(found) > 3
    for sentence, value in committed.items():
        values = value if isinstance(value, dict) else {"value": value}
        again = found[sentence] if isinstance(value, dict) else {"value": found[sentence]}
        assert again == pytest.approx(values, rel=1e-6, abs=1e-9), sentence
    assert Image.open(tmp_path / f"{name}.png").size[0] > 400


def test_redrawing_without_a_json_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["fig6.py", "--redraw", "--output_dir", str(tmp_path)])
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "figures"))
    with pytest.raises(SystemExit, match=r"error: No such file or directory: .*fig6\.json"):
        runpy.run_path(str(ROOT / "examples" / "figures" / "fig6.py"), run_name="__main__")

"""The figures' scripts: their claims against closed forms, and every figure from images to plot."""

import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, build_tiny_sd3
from PIL import Image

from szt_utils.embedding_files import save_embedding, save_rows
from szt_utils.errors import InputError
from szt_utils.files import write_json
from szt_utils.models import load_model
from szt_utils.pocket import write_concept
from szt_utils.tables import Cell, append_cell

FIGURES = {"fig2": ["--timesteps", 500, "--replacements", 2, "--images", 1],
           "fig3": ["--timesteps", 300, 700, "--replacements", 2, "--images", 1],
           "fig4": ["--timesteps", 3], "fig5": ["--timesteps", 3, "--draws", 1],
           "fig6": ["--saved_steps", 1, 2, "--draws", 1], "fig7": [], "spectra": ["--bands", 4]}
CONCEPTS = ("teal-striped-star", "red-dotted-heart")


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "figures"))
    yield importlib.import_module
    for name in ("common", "make_data", "roc", "snr", *FIGURES):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def short_sd3(tmp_path_factory):
    """Stable Diffusion 3 without T5."""
    return build_tiny_sd3(tmp_path_factory.mktemp("sd3"), t5=False)


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


def run_figure(name: str, *arguments) -> None:
    """Run a figure's script in this process, as a command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        patch.syspath_prepend(str(ROOT / "examples" / "figures"))
        runpy.run_path(str(ROOT / "examples" / "figures" / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_goes_from_images_to_json_to_plot(name, module, monkeypatch, data_dir, tiny_model,
                                                       tmp_path, capsys):
    def run():
        run_figure(name, "--pretrained_model_name_or_path", tiny_model, "--data_dir", data_dir,
                   "--output_dir", tmp_path, *FIGURES[name])
        return capsys.readouterr().out.splitlines()

    printed = run()
    found = json.loads((tmp_path / f"{name}_claims.json").read_text())
    assert len(printed) == len(found) > 2
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert list(results) == (["clean"] if name == "fig2" else ["clean", "adm+"])
    assert len(np.unique(np.asarray(Image.open(tmp_path / f"{name}.png")))) > 20
    # Again from the JSON alone, without a model.
    (tmp_path / f"{name}.png").unlink()
    monkeypatch.setattr("szt_utils.models.StableDiffusion.load", None)
    assert run() == printed and (tmp_path / f"{name}.png").exists()


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "fig7"])  # which has no model
def test_a_figure_measures_on_another_device(name, module, monkeypatch, data_dir, tiny_model):
    """Tensors without data, which refuse those of the CPU, stand for a GPU's; reading them gives ones."""
    def readable(read):
        return lambda values: read(torch.ones_like(values, device="cpu") if values.is_meta else values)
    figure = module(name)
    for method in ("cpu", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, method, readable(getattr(torch.Tensor, method)))
    loaded = []
    monkeypatch.setattr(module("common"), "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(module("common"), "load_model", lambda *args, **options: loaded.append(
        load_model(*args, **options)) or loaded[-1])
    options = {"fig2": {"timesteps": (500,)}, "fig3": {"timesteps": (300,)}, "fig5": {"draws": 1},
               "fig6": {"saved_steps": (1,), "draws": 1}}.get(name, {})
    settings = figure.Settings(str(tiny_model), (data_dir,), CONCEPTS[:1], **options)
    assert figure.measure(settings, "clean")
    assert loaded[0].device.type == "meta"


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
    expected = np.interp(0.9, share, timesteps[:10])
    below = found["adm+: timestep below which 90 % of the loss change lies"]
    assert below["value"] == pytest.approx(expected) and below["low"] == pytest.approx(below["high"])
    assert found["clean: Spearman correlation of median loss and timestep"] == pytest.approx(-1)


def test_fig6_compares_relative_reductions(module):
    losses = [[[0.2, 0.4], [0.1, 0.36]], [[0.4, 0.8], [0.2, 0.72]]]  # inside -50 %, outside -10 %
    found = module("fig6").claims({"clean": {"steps": [0, 10], "losses": losses}})
    assert found["clean: relative loss reduction inside"]["value"] == pytest.approx(0.5)
    assert found["clean: outside's reduction over inside's"]["value"] == pytest.approx(0.2)
    assert found["clean: outside's reduction over inside's"]["high"] == pytest.approx(0.2)


def test_fig6_measures_both_sides_of_the_mask_from_the_initializer_on(module, monkeypatch, data_dir,
                                                                      tiny_model):
    figure, common = module("fig6"), module("common")
    mask = torch.zeros(8, 8)
    mask[2:5, 1:7] = 1

    def losses(mask, **given):
        monkeypatch.setattr(common, "load_mask", lambda *_: mask)
        settings = figure.Settings(str(tiny_model), (data_dir,), CONCEPTS[:1], (1,), 2, **given)
        return np.array(figure.measure(settings, "clean")["losses"])[0]

    found = losses(mask)
    assert found == pytest.approx(losses(1 - mask)[:, ::-1])
    assert (np.abs(found[:, 0] / found[:, 1] - 1) > 1e-3).all()
    another = losses(mask, initializer="star")
    assert (another[0] != found[0]).all() and np.array_equal(another[1], found[1])


def test_fig5_averages_over_draws_of_their_own(module, monkeypatch, data_dir, tiny_model):
    figure = module("fig5")
    image_paths = figure.Settings.image_paths
    monkeypatch.setattr(figure.Settings, "image_paths", lambda *given: image_paths(*given)[:1])

    def norms(draws, seed):
        settings = figure.Settings(str(tiny_model), (data_dir,), CONCEPTS[:1], 3, draws, seed=seed)
        return np.array(figure.measure(settings, "clean")["norms"])

    one, two = norms(1, 0), norms(1, 1)
    assert norms(2, 0) == pytest.approx((one + two) / 2, rel=1e-4) and not np.allclose(one, two, rtol=1e-2)


def test_fig7_moments_of_a_histogram_are_those_of_its_values(module):
    from szt_utils.statistics import bimodality, excess_kurtosis

    values = np.random.default_rng(0).choice([-16, -15, 0, 3, 16], 5000)
    counts = np.bincount(values + 64, minlength=129).astype(float)
    assert module("fig7").moments(counts) == pytest.approx((excess_kurtosis(values), bimodality(values)))


def test_fig7_counts_what_lies_at_the_ends_of_the_budget(module):
    """One side may be cut off by the range of pixels."""
    counts = np.zeros((2, 129), int)
    for change, count in ((-16, 10), (-13, 20), (0, 30), (14, 50), (15, 90)):
        counts[:, 64 + change] = count
    counts[1, 64 + 16] = 1000
    after = np.zeros((2, 129), int)
    after[:, [64, 64 + 17]] = 3, 1
    names = ["cup/a", "dog/a"]
    found = module("fig7").claims({"adm-": {"before": counts.tolist(), "after": after.tolist(),
                                            "names": names}})
    ends = {when: found[f"adm- {when} JPEG: share within 2 levels of the budget's ends"]
            for when in ("before", "after")}
    assert ends["before"]["value"] == pytest.approx((150 + 1150) / (200 + 1200)) and ends["before"]["n"] == 2
    assert ends["after"]["value"] == pytest.approx(1 / 4)
    assert "clean before JPEG: excess kurtosis" not in found and len(found) == 6


def test_an_interval_is_of_concepts_and_needs_two(module):
    estimate = module("common").estimate
    names = ["few/cup/1", "few/cup/2", "few/dog/1"]
    several = estimate([1.0, 2.0, 6.0], names=names)
    assert (several["value"], several["n"]) == (3, 2) and several["low"] < 3 < several["high"]
    alone = estimate([1.0, 2.0], names=names[:2])
    assert (alone["value"], alone["n"], alone["low"], alone["high"]) == (1.5, 1, None, None)
    assert None not in estimate([1.0, 2.0]).values() and estimate([1.0])["low"] is None


@pytest.mark.parametrize("has_model", [False, True])
def test_the_area_under_the_roc_curve_of_two_diagnoses(module, tmp_path, capsys, has_model):
    """The model's scores count where there are any."""
    for name, scores in (("clean", [1, 2, 3, 4]), ("ea", [2.5, 5, 6, 7])):
        (tmp_path / name).mkdir()
        images = {f"photo-{i}.png": {"score": score} for i, score in enumerate([*scores, None])}
        pixels = {"images": {path: {"score": 0} for path in images}}
        (tmp_path / name / "diagnosis.json").write_text(json.dumps(
            {**pixels, "model": {"images": images}} if has_model else {"images": images}))
    module("roc").main(["--clean", str(tmp_path / "clean"), "--poisoned", str(tmp_path / "ea"),
                        "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "roc.json").read_text())
    assert found["ea"]["value"] == found["ea, photographs"]["value"] == pytest.approx(14 / 16)
    assert (tmp_path / "roc.png").exists() and "ea: 0.875" in capsys.readouterr().out


@pytest.mark.parametrize("folder,name", [(".", "fig4"), (".", "fig5"), (".", "fig6"), ("five", "fig4"),
                                         ("five", "spectra")])
def test_the_committed_claims_follow_from_the_committed_json(folder, name, module, tmp_path, capsys):
    home = ROOT / "results" / "world-0.1" / "figures" / folder
    (tmp_path / f"{name}.json").write_text((home / f"{name}.json").read_text())
    run_figure(name, "--redraw", "--output_dir", tmp_path)
    found, committed = (json.loads((where / f"{name}_claims.json").read_text()) for where in (tmp_path, home))
    assert found.keys() == committed.keys() and len(found) > 3
    for sentence, value in committed.items():
        values = value if isinstance(value, dict) else {"value": value}
        again = found[sentence] if isinstance(value, dict) else {"value": found[sentence]}
        assert again == pytest.approx(values, rel=1e-6, abs=1e-9), sentence
    assert Image.open(tmp_path / f"{name}.png").size[0] > 400


def test_squares_of_one_photograph_are_resampled_together(module):
    names = [f"p{i}-{share}.png" for i in range(6) for share in (100, 50)]
    clean = {name: float(i // 2) for i, name in enumerate(names)}
    poisoned = {name: value + 1.5 for name, value in clean.items()}
    found = module("roc").area(clean, poisoned)
    assert found["n"] == 6 and found["value"] == pytest.approx(
        module("roc").area({n: v for n, v in clean.items() if "100" in n},
                           {n: v for n, v in poisoned.items() if "100" in n})["value"])


def test_redrawing_without_a_json_is_one_sentence(module, tmp_path):
    with pytest.raises(SystemExit, match=r"error: No such file or directory: .*fig6\.json"):
        run_figure("fig6", "--redraw", "--output_dir", tmp_path)


@pytest.mark.parametrize("name, lacking", [
    ("fig3", "clean"), ("fig4", "clean"), ("fig4", "adm+"), ("fig5", "clean"), ("fig5", "adm+"),
    ("fig7", "clean"), ("spectra", "clean")])
def test_a_concept_that_one_data_set_lacks_has_no_part_in_the_comparison(name, lacking, module, data_dir,
                                                                         tiny_model, tmp_path):
    star, heart = CONCEPTS  # the heart comes first
    folder, found = tmp_path / "data", []
    shutil.copytree(data_dir, folder, ignore=lambda path, names: [heart] * (Path(path).name == lacking))
    for output, more in (("all", []), ("star", ["--concepts", star])):
        run_figure(name, "--pretrained_model_name_or_path", tiny_model, "--data_dir", folder, "--output_dir",
                   tmp_path / output, *FIGURES[name], *more)
        claims = json.loads((tmp_path / output / f"{name}_claims.json").read_text())
        found.append({sentence: value for sentence, value in claims.items() if sentence.startswith("adm+")
                      and ("of clean" in sentence or name not in ("fig3", "fig5"))})
    assert found[0] == found[1] and found[0]


def test_results_are_kept_for_the_same_concepts_and_images(module, tmp_path):
    common, measured, home = module("common"), [], tmp_path / "data"

    def add(*names):
        for name in names:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(home / f"{name}.png")

    def measure(settings, data):
        measured.append(data)
        return {"concepts": settings.concepts_in(data)}

    def run(names=None, model="model"):
        measured.clear()
        results = common.measured(tmp_path / "figure.json", common.Settings(model, (home,), None), measure,
                                  names, common.DATA)
        return measured.copy(), [result["concepts"] for result in results.values()]

    add("clean/cup/1", "clean/dog/1", "adm+/cup/1", "ea/fox/1")
    assert run() == (["clean", "adm+"], [["cup", "dog"], ["cup"]])  # no image of 'ea' is in 'clean'
    assert run() == ([], [["cup", "dog"], ["cup"]])
    add("adm+/dog/1")  # a concept
    assert run() == (["adm+"], [["cup", "dog"]] * 2)
    add("adm+/dog/2")  # an image
    assert run()[0] == ["adm+"]
    add("clean/dog/2")  # others are compared with it
    assert run()[0] == ["clean", "adm+"] and run()[0] == []
    add("masks/cup/1")
    assert run()[0] == ["clean", "adm+"] and run()[0] == []
    (home / "learned/adm+/cup").mkdir(parents=True)
    (home / "learned/adm+/cup/learned_embeds.safetensors").write_bytes(b"x")
    assert run()[0] == ["adm+"] and run()[0] == []
    assert run(model="another")[0] == ["clean", "adm+"] and run()[0] == ["clean", "adm+"]
    with pytest.raises(InputError, match="The data set 'ea' in .* has none of the images of 'clean'"):
        run(["clean", "ea"])


def test_images_of_one_name_are_refused(module, tmp_path):
    folders = [tmp_path / "a" / "few", tmp_path / "b" / "few"]
    for folder in folders:
        (folder / "clean" / "cup").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "clean" / "cup" / "1.png")
    with pytest.raises(SystemExit, match="error: The images .* and .* are both named 'few/cup/1'"):
        run_figure("fig4", "--data_dir", *folders, "--output_dir", tmp_path)


def test_without_clean_images_there_is_nothing_to_compare_with(module, tmp_path):
    with pytest.raises(SystemExit, match="error: The data set 'clean' is not in"):
        run_figure("fig7", "--data_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family, encoders", [("tiny_model", 1), ("tiny_sdxl", 2), ("short_sd3", 2)])
def test_the_rows_of_the_added_token_are_what_it_means(module, family, encoders, request):
    from szt_utils.models import load_model, tokenize

    common = module("common")
    model = load_model(request.getfixturevalue(family))
    plain = model.condition(tokenize(model, "a photo of a star"))["states"]
    star = common.word_rows(model, "star")
    embeddings = common.add_token(model)
    assert len(embeddings) == len(star) == encoders
    common.set_rows(embeddings, star)
    ids = tokenize(model, f"a photo of a {common.TOKEN}")
    assert all((each == len(embedding.frozen)).sum() == 1
               for each, embedding in zip(ids, embeddings, strict=True))
    assert torch.equal(model.condition(ids)["states"], plain)
    assert torch.equal(model.condition(tokenize(model, "a photo of a star"))["states"], plain)
    for i in range(encoders):  # every encoder reads its own row
        common.set_rows(embeddings, [-row if k == i else row for k, row in enumerate(star)])
        assert not torch.allclose(model.condition(ids)["states"], plain)


@pytest.mark.parametrize("name", ["fig4", "fig5", "fig6"])
def test_figures_take_models_of_several_text_encoders(name, module, data_dir, short_sd3, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    for path in (folder / "learned").rglob("*.safetensors"):
        save_rows(path, {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 24)})
    run_figure(name, "--pretrained_model_name_or_path", short_sd3, "--data_dir", folder,
               "--output_dir", tmp_path, *FIGURES[name])
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert list(results) == ["clean", "adm+"]
    if name != "fig6":  # the last timestep of a flow model is pure noise
        first, middle, last = results["clean"]["log_snr"]
        assert first == pytest.approx(2 * np.log(999)) and last is None
        sigma = (results["clean"]["timesteps"][1] + 1) / 1000
        assert middle == pytest.approx(2 * np.log((1 - sigma) / sigma), abs=1e-9)


def make_data(module, model: Path, output_dir: Path, *arguments) -> None:
    """Run make_data.py in this process, with short attacks and trainings."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    module("make_data").main([*map(str, [
        "--pretrained_model_name_or_path", model, "--output_dir", output_dir, "--poison_steps", 1,
        "--save_steps", 1, *arguments])])


def test_the_data_sets_have_what_the_figures_read(module, tiny_model, tmp_path):
    arguments = ("--data", "clean", "ea", "--concepts", *CONCEPTS, "--images", 1, "--train_steps", 2)
    make_data(module, tiny_model, tmp_path, *arguments)
    for concept in CONCEPTS:
        for folder in ("clean", "masks", "ea"):
            assert [path.name for path in (tmp_path / folder / concept).iterdir()] == [f"{concept}-00.png"]
        for data in ("clean", "ea"):
            learned = tmp_path / "learned" / data / concept
            assert {"learned_embeds.safetensors", "learned_embeds-steps-1.safetensors"} <= {
                path.name for path in learned.iterdir()}
    records = (tmp_path / "ea" / "stats.jsonl").read_text()
    assert len(records.splitlines()) == 2
    make_data(module, tiny_model, tmp_path, *arguments)  # nothing is left to do
    assert (tmp_path / "ea" / "stats.jsonl").read_text() == records


def test_images_of_ones_own_become_squares_with_masks(module, tiny_model, tmp_path):
    for folder in ("photos/cup", "photo-masks/cup"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (90, 70), "red").save(tmp_path / "photos" / "cup" / "a.jpg")
    Image.new("L", (90, 70), 255).save(tmp_path / "photo-masks" / "cup" / "a.png")
    make_data(module, tiny_model, tmp_path / "out", "--clean_dir", tmp_path / "photos", "--mask_dir",
              tmp_path / "photo-masks", "--data", "clean", "ea", "--resolution", 64, "--train_steps", 0)
    sizes = {folder: Image.open(tmp_path / "out" / folder / "cup" / "a.png").size
             for folder in ("clean", "masks", "ea")}
    assert set(sizes.values()) == {(64, 64)}
    with pytest.raises(SystemExit):
        make_data(module, tiny_model, tmp_path / "out", "--clean_dir", tmp_path / "photos")


def write_model(folder: Path, log_snr: list, thresholds: dict[str, float]) -> None:
    """Two timesteps and pure noise: losses and norms of fig4 and fig5, and a table of two concepts.

    One clean image has no poisoned copy.
    """
    losses = {"clean": [[9.0, 9.0, 9.0], *[[1.0, 2.0, 3.0]] * 2], "ea": [[3.0, 2.5, 3.0], [5.0, 2.5, 3.0]]}
    norms = {"clean": [[1.0, 4.0, 9.0]] * 2, "ea": [[6.0, 3.0, 9.0]] * 2}
    folder.mkdir()
    for name, key, values in (("fig4", "losses", losses), ("fig5", "norms", norms)):
        write_json(folder / f"{name}.json", {"settings": {}, "results": {
            data: {"timesteps": [0, 500, 999], "log_snr": log_snr, key: rows,
                   "names": ["alone", "a", "b"][-len(rows):]}
            for data, rows in values.items()}})
    for concept, shift in (("one", 0.0), ("two", 0.1)):
        for defence, value in {"nominal": 0.1, **thresholds}.items():
            append_cell(folder, Cell("ea", defence, concept, 0, {"dino": value + shift}))
        append_cell(folder, Cell("clean", "t250", concept, 0, {"dino": 0.9}))


def test_models_are_compared_at_the_same_signal_to_noise_ratio(module, tmp_path):
    write_model(tmp_path / "a", [4.0, -2.0, None], {"t250": 0.5, "t500": 0.3})
    write_model(tmp_path / "b", [8.0, 0.0, -8.0], {"t250": 0.2, "t500": 0.6})
    module("snr").main(["--labels", "A", "B", "--folders", *(str(tmp_path / name) for name in "ab"),
                        "--tables", *(str(tmp_path / name) for name in "ab"), "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "snr_claims.json").read_text())

    def value(sentence):
        return found[sentence]["value"] if isinstance(found[sentence], dict) else found[sentence]
    # At timestep 0 the loss is 4 instead of 1, at 500 2.5 instead of 2; linear between. A is known at the
    # log-SNRs from -2 to 4, so only these count; the paper's is -0.9625.
    increase = "{}, ea: mean relative loss increase {} the paper's SNR".format
    assert value(increase("A", "above")) == pytest.approx(0.25 + 2.75 * (2 + (4 - 0.9625) / 2) / 6)
    assert value(increase("A", "below")) == pytest.approx(0.25 + 2.75 * (2 - (2 + 0.9625) / 2) / 6)
    last = 0.25 * (1 - 0.9625 / 8)  # of B, where it falls to 0 at -8
    assert value(increase("B", "above")) == pytest.approx(
        ((0.25 + 1.625) / 2 * 4 + (0.25 + last) / 2 * 0.9625) / 4.9625, rel=1e-3)
    assert value("A, clean: log-SNR of the peak of the gradient") == -2  # not pure noise
    assert value("A, ea: log-SNR of the peak of the gradient") == 4
    assert value("B, clean: log-SNR of the peak of the gradient") == -8
    assert value("A: log-SNR of the best threshold") == pytest.approx(1)  # t = 250
    assert value("A: similarity with the best threshold") == pytest.approx(0.55)
    assert value("B: log-SNR of the best threshold") == 0  # t = 500
    share = (1 + 0.9625) / 3  # of the way from t = 250 to t = 500
    assert value("A: similarity with the threshold of the paper's SNR") == pytest.approx(0.55 - 0.2 * share)
    assert Image.open(tmp_path / "snr.png").size[1] > 600


def test_a_table_without_thresholds_and_figures_without_snr_are_refused(module, tmp_path):
    write_model(tmp_path / "a", [4.0, -2.0, None], {})
    curves = module("snr").read_curves
    with pytest.raises(InputError, match="no thresholds"):
        curves(tmp_path / "a", tmp_path / "a")
    write_json(tmp_path / "a" / "fig5.json", {"results": {"clean": {"norms": []}}})
    with pytest.raises(InputError, match="no log_snr"):
        curves(tmp_path / "a", tmp_path / "a")

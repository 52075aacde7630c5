"""Sensitivity maps against Eq. 6 word for word in float64, on models of both families; cross-attention
against the layers' own arithmetic."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_sdxl
from safetensors.torch import save_file

from szt_utils.embedding_files import save_embedding
from szt_utils.embeddings import add_embedding
from szt_utils.errors import InputError
from szt_utils.models import Model, load_model
from szt_utils.sensitivity import (
    _grid,
    attention_recorded,
    cross_attention_maps,
    draw_replacements,
    prompt_conditions,
    semantic_sensitivity,
    tokenize_words,
)

TEXT, WORDS, TIMESTEPS, COUNT = "a photo of a red star on grass", ["star", "a", "grass"], [10, 500, 990], 3
SIZE = (8, 12)  # not square


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory):
    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="module")
def folders(tiny_model, tiny_sdxl):
    return {"sd": tiny_model, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 4, *SIZE, generator=generator, dtype=torch.float64) for n in (1, 2))


def load(folder, dtype=torch.float64) -> Model:
    return load_model(str(folder), dtype=dtype)


def vocabulary_size(model: Model) -> int:
    return model.tokenizers[0].vocab_size


def add(model: Model, path) -> tuple[str, int]:
    return add_embedding(model.tokenizers, model.text_encoders, path)


def plain_conditions(model, prompt, vectors) -> dict:
    """The U-Net's text arguments when the encoders' embedding layers give `vectors`, (L, D) each."""
    outputs = []
    for encoder, ids, rows in zip(model.text_encoders, prompt.ids, vectors, strict=True):
        encoder = copy.deepcopy(encoder)
        layer = encoder.get_input_embeddings()
        layer.register_forward_hook(lambda module, args, output, rows=rows: rows.unsqueeze(0))
        outputs.append(encoder(ids, output_hidden_states=True))
    if len(outputs) == 1:
        return dict(encoder_hidden_states=outputs[0].last_hidden_state)
    height, width = (8 * side for side in SIZE)
    return dict(encoder_hidden_states=torch.cat([o.hidden_states[-2] for o in outputs], -1),
                added_cond_kwargs={"text_embeds": outputs[1].text_embeds, "time_ids": torch.tensor(
                    [[height, width, 0, 0, height, width]], dtype=torch.float64)})


@torch.no_grad()
def naive(model, latents, noise, prompt, drawn) -> torch.Tensor:
    """Eq. 6, one forward pass at a time, with the noised latent of Eq. 1 from the betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    tables = [encoder.get_input_embeddings().weight for encoder in model.text_encoders]
    own = [table[ids[0]] for table, ids in zip(tables, prompt.ids, strict=True)]
    maps = torch.zeros(len(prompt.words), len(TIMESTEPS), *SIZE, dtype=torch.float64)
    for w in range(len(prompt.words)):
        for i, t in enumerate(TIMESTEPS):
            for draw in noise:
                noised = alphas[t].sqrt() * latents + (1 - alphas[t]).sqrt() * draw
                before = model.network(noised, t, **plain_conditions(model, prompt, own)).sample
                for r in range(COUNT):
                    changed = [vectors.clone() for vectors in own]
                    for vectors, table in zip(changed, tables, strict=True):
                        for position in prompt.positions[w]:
                            vectors[position] = table[drawn[w * COUNT + r, position]]
                    after = model.network(noised, t, **plain_conditions(model, prompt, changed)).sample
                    maps[w, i] += ((before - after) ** 2)[0].sum(0) / COUNT / len(noise)
    return maps


@pytest.mark.parametrize("shape", ["sd", "sdxl"])
def test_maps_are_equation_6(folders, inputs, shape):
    model, (latents, noise) = load(folders[shape]), inputs
    prompt = tokenize_words(model, TEXT, WORDS)
    replaced, drawn = draw_replacements(prompt, COUNT, vocabulary_size(model),
                                        torch.Generator().manual_seed(1))
    maps = semantic_sensitivity(model, latents, prompt, TIMESTEPS, noise=noise, replaced=replaced,
                                drawn=drawn)
    assert maps.shape == (3, 3, *SIZE) and maps.dtype == torch.float64
    wanted = naive(model, latents, noise, prompt, drawn)
    assert wanted.min() > 0
    # The scheduler's alphas are float32, which bounds the agreement from below.
    assert torch.allclose(maps, wanted, rtol=1e-5, atol=0)
    # The second "a" counts too, and every word has its own map.
    assert prompt.positions == [[6], [1, 4], [8]]
    assert not torch.allclose(maps[0], maps[2], rtol=0.1)


@pytest.mark.parametrize("shape", ["sd", "sdxl"])
def test_unchanged_conditions_are_the_pipelines_own(folders, shape):
    from diffusers import DiffusionPipeline

    model = load(folders[shape], torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(folders[shape])
    encoded = pipeline.encode_prompt(TEXT, device="cpu", num_images_per_prompt=1,
                                     do_classifier_free_guidance=False)
    condition = prompt_conditions(model, tokenize_words(model, TEXT))
    assert torch.allclose(condition["states"], encoded[0], atol=1e-6)
    assert shape == "sd" or torch.allclose(condition["pooled"], encoded[2], atol=1e-6)


def test_one_batch_of_replacements_and_the_unchanged_prediction_once(folders, inputs, monkeypatch):
    model, (latents, noise) = load(folders["sd"]), inputs
    prompt, sizes = tokenize_words(model, TEXT, ["star", "grass"]), []
    replaced, drawn = draw_replacements(prompt, 16, vocabulary_size(model), torch.Generator().manual_seed(1))
    forward = model.network.forward

    def counted(noised, *args, **kwargs):
        sizes.append(len(noised))
        return forward(noised, *args, **kwargs)

    monkeypatch.setattr(model.network, "forward", counted)

    def maps(**kwargs):
        sizes.clear()
        return semantic_sensitivity(model, latents, prompt, [500], noise=noise[:1], replaced=replaced,
                                    drawn=drawn, **kwargs)
    whole = maps()
    assert sizes == [17, 16]
    texts = []
    model.text_encoders[0].register_forward_hook(lambda encoder, args, output: texts.append(len(output[0])))
    limited = maps(batch_size=10)
    assert sizes == [10, 7, 10, 6] and torch.allclose(whole, limited, rtol=1e-9)
    assert texts == [10, 10, 10, 3]


def test_maps_of_a_model_in_half_precision_are_float32(folders, inputs):
    """The squares of small changes would be 0 in float16."""
    model, (latents, noise) = load(folders["sd"], torch.bfloat16), inputs
    prompt = tokenize_words(model, TEXT, ["star"])
    replaced, drawn = draw_replacements(prompt, 2, vocabulary_size(model), torch.Generator().manual_seed(1))
    maps = semantic_sensitivity(model, latents.bfloat16(), prompt, [500], noise=noise, replaced=replaced,
                                drawn=drawn)
    assert maps.dtype == torch.float32 and (maps.bfloat16() != maps).any()


def test_t5_has_a_vocabulary_of_its_own_and_lacks_the_start_token(tiny_sd3):
    model = load(tiny_sd3, torch.float32)
    prompt = tokenize_words(model, TEXT, ["<|startoftext|>", "star"])
    length = prompt.ids[0].shape[1]
    assert prompt.positions[0] == [0] and prompt.t5_positions[0] == [] and prompt.t5_positions[1]
    replaced, drawn = draw_replacements(prompt, 2000, vocabulary_size(model), torch.Generator())
    assert not replaced[:2000, length:].any() and replaced[2000:, length:].any(1).all()
    sizes = vocabulary_size(model), prompt.t5_size
    assert sizes[0] != sizes[1] == model.t5.tokenizer.vocab_size
    assert (drawn[:, :length].max() + 1, drawn[:, length:].max() + 1) == sizes


def test_replacing_a_word_by_itself_changes_nothing(folders, inputs):
    model, (latents, noise) = load(folders["sdxl"]), inputs
    prompt = tokenize_words(model, TEXT, ["star"])
    replaced, _ = draw_replacements(prompt, COUNT, vocabulary_size(model), torch.Generator())
    same = prompt.ids[0].expand(COUNT, -1)
    maps = semantic_sensitivity(model, latents, prompt, [500], noise=noise, replaced=replaced, drawn=same)
    assert (maps == 0).all()


def test_replacements_come_from_the_whole_vocabulary_and_nothing_else(folders, tmp_path):
    model = load(folders["sd"])
    size = vocabulary_size(model)
    save_embedding(tmp_path / "c.safetensors", "<c>", torch.randn(1, 32))
    add(model, tmp_path / "c.safetensors")
    assert vocabulary_size(model) == size
    prompt = tokenize_words(model, "a <c>", ["<c>"])
    replaced, drawn = draw_replacements(prompt, 4000, size, torch.Generator())
    assert set(drawn.flatten().tolist()) == set(range(size))
    assert replaced.shape == drawn.shape and (replaced.sum(1) == 1).all() and replaced[:, 2].all()


def test_a_learned_embedding_of_two_vectors_is_loaded_and_replaced_as_a_whole(folders, tmp_path, inputs):
    model, rows = load(folders["sd"]), torch.randn(2, 32)
    save_embedding(tmp_path / "c.safetensors", "<c>", rows)
    assert add(model, tmp_path / "c.safetensors") == ("<c>", 2)
    prompt = tokenize_words(model, "a <c> <c>_1 on grass", ["<c> <c>_1"])
    assert prompt.positions == [[2, 3]]
    learned = model.text_encoders[0].get_input_embeddings().weight[prompt.ids[0][0, 2:4]]
    assert torch.equal(learned, rows.double())


def test_a_learned_embedding_of_an_sdxl_model(folders, tmp_path):
    model = load(folders["sdxl"])
    rows = {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 24)}
    save_file(rows, tmp_path / "Toy.safetensors")
    assert add(model, tmp_path / "Toy.safetensors") == ("<toy>", 1)
    prompt = tokenize_words(model, "a <toy>", ["<toy>"])
    for encoder, ids, row in zip(model.text_encoders, prompt.ids, rows.values(), strict=True):
        assert torch.equal(encoder.get_input_embeddings().weight[ids[0, 2]], row[0].double())


def test_what_does_not_fit_the_model_is_refused(folders, tmp_path):
    model = load(folders["sd"])
    for prompt, words, message in ((TEXT, ["ring"], "'ring' is not in the prompt"),
                                   ("star " * 40, None, "more than the 24 tokens"),
                                   (" ", None, "has no word; describe the image")):
        with pytest.raises(InputError, match=message):
            tokenize_words(model, prompt, words)
    save_embedding(tmp_path / "wide.safetensors", "<w>", torch.randn(1, 33))
    save_embedding(tmp_path / "star.safetensors", "star", torch.randn(1, 32))
    for name, message in (("wide", "another model"), ("star", "already in the model's vocabulary"),
                          ("none", "cannot be read")):
        with pytest.raises(InputError, match=message):
            add(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="width 33, but the model's are 32 and 24 wide"):
        add(load(folders["sdxl"]), tmp_path / "wide.safetensors")
    shutil.copytree(folders["sdxl"], tmp_path / "half", ignore=shutil.ignore_patterns("text_encoder_2"))
    with pytest.raises(InputError, match="text_encoder_2"):
        load(tmp_path / "half")


@pytest.mark.parametrize("shape", ["sd", "sdxl"])
def test_cross_attention_is_what_the_layers_compute(folders, inputs, shape):
    model, (latents, noise) = load(folders[shape]), inputs
    words = ["<|startoftext|>", *dict.fromkeys(TEXT.split()), "<|endoftext|>"]
    everything = tokenize_words(model, TEXT, words)
    processors = {name: type(p) for name, p in model.network.attn_processors.items()}
    maps = cross_attention_maps(model, latents, everything, [500], noise=noise[:1])
    assert {name: type(p) for name, p in model.network.attn_processors.items()} == processors
    # All words of the prompt with start and end share all attention.
    assert maps.shape == (len(everything.words), 1, *SIZE)
    assert torch.allclose(maps.sum(0), torch.ones(1, *SIZE), atol=1e-5)
    assert maps.min() > 0
    both, second = (cross_attention_maps(model, latents, everything, [500], noise=draws)
                    for draws in (noise, noise[1:]))
    assert torch.allclose(both, (maps + second) / 2, atol=1e-6)

    # One layer, from its weights and its inputs.
    layers = [m for name, m in model.network.named_modules() if name.endswith("attn2")]
    seen = []
    handle = layers[0].register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out)),
                                             with_kwargs=True)
    noised = model.scheduler.add_noise(latents, noise[:1], torch.tensor([500]))
    condition, at = prompt_conditions(model, everything), torch.tensor([500])
    with torch.no_grad(), attention_recorded(model.network) as recorded:
        output = model.predict(noised, at, condition)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(output, model.predict(noised, at, condition))
        (args, kwargs, _), layer = seen[0], layers[0]
        query = layer.to_q(args[0]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        key = layer.to_k(kwargs["encoder_hidden_states"]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        wanted = F.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1).mean(1)
    assert len(recorded) == len(layers) and recorded[0].shape == wanted.shape
    assert any(torch.allclose(r.double(), wanted, atol=1e-6) for r in recorded)


def test_a_layers_grid_is_the_latents_halved_and_rounded_up():
    assert _grid(96, (8, 12)) == (8, 12) and _grid(24, (8, 12)) == (4, 6)
    assert _grid(5 * 3, (9, 5)) == (5, 3) and _grid(3 * 2, (9, 5)) == (3, 2)

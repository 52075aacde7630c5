"""Embedding files of every tool load into every family in one call; what does not fit names both widths."""

import itertools
import os

import pytest
import torch
from conftest import TOKEN, build_tiny_sdxl
from diffusers import AutoPipelineForText2Image
from safetensors.torch import save_file

from szt_utils.embedding_files import (
    ANY_ENCODER,
    MEGABYTES,
    embedding_paths,
    load_embedding,
    read_embedding,
    save_embedding,
    save_rows,
    trained_with,
)
from szt_utils.embeddings import load_into
from szt_utils.errors import InputError


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def pipeline(request, tiny_model, sdxl):
    folder = {"sd": tiny_model, "sdxl": sdxl}[request.param]
    extra = {"safety_checker": None} if request.param == "sd" else {"add_watermarker": False}
    return AutoPipelineForText2Image.from_pretrained(folder, **extra)


def rows(width, count=2):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width))


def encoders(pipeline):
    return [(pipeline.tokenizer, pipeline.text_encoder)] + (
        [(pipeline.tokenizer_2, pipeline.text_encoder_2)] if hasattr(pipeline, "text_encoder_2") else [])


def loaded(pipeline, token, count=2) -> list[torch.Tensor]:
    """The rows that a prompt with the token reaches in each text encoder."""
    found = []
    for tokenizer, encoder in encoders(pipeline):
        prompt = pipeline.maybe_convert_prompt(f"a {token}", tokenizer)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids[-count:]
        found.append(encoder.get_input_embeddings().weight[ids].detach())
    return found


# --- One text encoder

@pytest.mark.parametrize("pipeline", ["sd"], indirect=True)
@pytest.mark.parametrize("name, content, token", [
    ("cat.safetensors", {TOKEN: rows(32)}, TOKEN),  # Diffusers
    ("cat.safetensors", {"emb_params": rows(32)}, "<cat>"),  # kohya
    ("cat.safetensors", {"emp_params": rows(32)}, "<cat>"),  # OneTrainer
    ("cat.safetensors", {"clip_l": rows(32)}, "<cat>"),
    ("cat.bin", {TOKEN: rows(32)}, TOKEN),
    ("cat.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": rows(32)}, "name": "kitten",
                "step": 100}, "kitten")])  # A1111
def test_files_of_one_text_encoder(pipeline, tmp_path, name, content, token):
    path = tmp_path / name
    save_file(content, path) if name.endswith("safetensors") else torch.save(content, path)
    assert load_into(pipeline, path) == token
    assert torch.equal(loaded(pipeline, token)[0], rows(32))


def test_a_parameter_of_a1111_counts_as_its_tensor(tmp_path):
    torch.save({"string_to_param": {"*": torch.nn.Parameter(rows(32))}, "name": "kitten"}, tmp_path / "a.pt")
    token, found = read_embedding(tmp_path / "a.pt")
    assert token == "kitten" and torch.equal(found[ANY_ENCODER], rows(32))


@pytest.mark.parametrize("pipeline", ["sd"], indirect=True)
def test_one_vector_may_be_flat(pipeline, tmp_path):
    save_file({"<c>": rows(32, 1)[0]}, tmp_path / "c.safetensors")
    assert load_into(pipeline, tmp_path / "c.safetensors") == "<c>"
    assert torch.equal(loaded(pipeline, "<c>", 1)[0], rows(32, 1))


# --- Two text encoders

@pytest.mark.parametrize("pipeline", ["sdxl"], indirect=True)
@pytest.mark.parametrize("given", ["folder", "first", "named"])
def test_files_of_two_text_encoders(pipeline, tmp_path, given):
    """A training's folder, its first file beside the second, or the file of clip_l and clip_g."""
    save_embedding(tmp_path / "learned_embeds.safetensors", TOKEN, rows(32))
    save_embedding(tmp_path / "learned_embeds_2.safetensors", TOKEN, rows(24))
    save_rows(tmp_path / "star.safetensors", {"clip_l": rows(32), "clip_g": rows(24)})
    path = {"folder": tmp_path, "first": tmp_path / "learned_embeds.safetensors",
            "named": tmp_path / "star.safetensors"}[given]
    assert load_into(pipeline, path) == TOKEN
    assert all(torch.equal(a, b) for a, b in zip(loaded(pipeline, TOKEN), (rows(32), rows(24)), strict=True))


@pytest.mark.parametrize("pipeline", ["sdxl"], indirect=True)
def test_what_else_a_file_holds_is_ignored_where_tools_ignore_it(pipeline, tmp_path):
    """OneTrainer adds rows for the encoders' outputs, SD3 files rows of T5: SDXL has no use for either."""
    save_file({"clip_l": rows(32), "clip_g": rows(24), "clip_l_out": rows(32), "t5": rows(64)},
              tmp_path / "c.safetensors")
    load_into(pipeline, tmp_path / "c.safetensors")
    assert torch.equal(loaded(pipeline, "<c>")[1], rows(24))


def test_files_of_stable_diffusion_3_with_rows_of_t5(tiny_sd3, tmp_path):
    content = {"clip_l": rows(32), "clip_g": rows(24), "t5xxl": rows(64)}
    save_rows(tmp_path / "c.safetensors", content)
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_sd3)
    assert load_into(pipeline, tmp_path / "c.safetensors") == "<c>"
    for suffix, expected in zip(("", "_2", "_3"), content.values(), strict=True):
        tokenizer, encoder = (getattr(pipeline, f"{part}{suffix}") for part in ("tokenizer", "text_encoder"))
        ids = tokenizer.convert_tokens_to_ids(["<c>", "<c>_1"])
        assert torch.equal(encoder.get_input_embeddings().weight[ids], expected)


# --- Where they lie

def test_the_second_file_is_that_of_the_same_step(tmp_path):
    names = ["learned_embeds-steps-2.safetensors", "learned_embeds_2-steps-2.safetensors"]
    for name in (*names, "learned_embeds.safetensors", "learned_embeds_2.safetensors"):
        (tmp_path / name).touch()
    assert embedding_paths(tmp_path / names[0]) == [tmp_path / name for name in names]


def test_the_safetensors_file_of_a_folder_comes_before_another(tmp_path):
    for suffix in ("bin", "safetensors"):
        (tmp_path / f"learned_embeds.{suffix}").touch()
    assert embedding_paths(tmp_path) == [tmp_path / "learned_embeds.safetensors"]


# --- What does not fit

@pytest.mark.parametrize("pipeline, content, message", [
    ("sd", {TOKEN: rows(48)}, "width 48, but the model's are 32 wide"),
    ("sd", {"clip_l": rows(48), "clip_g": rows(24)}, "width 48 and 24, but the model's are 32 wide"),
    ("sdxl", {TOKEN: rows(32)}, "width 32, but the model's are 32 and 24 wide"),
    ("sdxl", {"clip_l": rows(24), "clip_g": rows(32)}, "width 24 and 32, but the model's are 32 and 24"),
    ("sdxl", {"clip_g": rows(24)}, "width 24, but"),
    ("sd", {"star": rows(32)}, "'star' of the embedding .* is already"),
    ("sd", {TOKEN: torch.full((1, 32), float("nan"))}, "not finite"),
    ("sd", {TOKEN: torch.ones(1, 2, 32)}, "one vector, or rows of them"),
    ("sd", {"a": rows(32), "b": rows(32)}, "must hold exactly one token, but holds 2"),
    ("sd", {TOKEN: torch.ones(2, 32, dtype=torch.int32)}, "floating-point"),
    ("sd", {TOKEN: torch.ones(0, 32)}, "floating-point"),
    ("sd", {TOKEN: torch.ones(100_000, 101)}, "at most 10,000,000"),
    ("sd", {TOKEN: rows(32, 76)}, "76 vectors, but a prompt has room for 22"),
    ("sd", {"<a\x1b[2J>": rows(32)}, "cannot be written in a prompt"),
    ("sd", {" ": rows(32)}, "cannot be written in a prompt"),
    ("sdxl", {"clip_l": rows(32), "clip_g": rows(24, 3)}, "another number of vectors")],
    indirect=["pipeline"])
def test_what_does_not_fit_is_refused_and_changes_nothing(pipeline, tmp_path, content, message):
    save_file(content, tmp_path / "c.safetensors")
    before = [(len(tokenizer), len(encoder.get_input_embeddings().weight))
              for tokenizer, encoder in encoders(pipeline)]
    with pytest.raises(InputError, match=message):
        load_into(pipeline, tmp_path / "c.safetensors")
    assert before == [(len(tokenizer), len(encoder.get_input_embeddings().weight))
                      for tokenizer, encoder in encoders(pipeline)]


class Payload:
    def __init__(self, function=open, *arguments):
        self.call = function, arguments or ("was-run", "w")

    def __reduce__(self):
        return self.call


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    payloads = Payload(), Payload(os.system, "touch was-run"), Payload(eval, "open('was-run', 'w')")
    for name, payload in itertools.product(("evil.pt", "evil.bin"), payloads):
        torch.save({"string_to_param": {"*": payload}}, tmp_path / name)
        with pytest.raises(InputError, match="cannot be read: it holds code, which is never run"):
            read_embedding(tmp_path / name)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content,message", [
    ({TOKEN: torch.ones(1).expand(10**6, 10**6)}, "at most 10,000,000"),
    ({TOKEN: torch.eye(32).to_sparse()}, "floating-point"),
    ({TOKEN: torch.ones(2, 32, device="meta")}, "floating-point"),
    ({1: torch.ones(2, 32), 2: 3}, "exactly one token, but holds 2"), ({}, "holds none"),
    ({"string_to_param": {"*": "text"}}, "exactly one token"), ({TOKEN: None}, "exactly one token")])
def test_odd_content_of_a_torch_file(tmp_path, content, message):
    torch.save(content, tmp_path / "c.bin")
    with pytest.raises(InputError, match=message):
        read_embedding(tmp_path / "c.bin")


def test_a_damaged_file_is_no_code_and_a_model_no_embedding(tmp_path):
    huge = b'{"a":{"dtype":"F32","shape":[1000000000,1000000],"data_offsets":[0,4]}}'
    for name, content in (("a.bin", b"hello"), ("b.bin", b""), ("c.bin", b"PK\x03\x04"),
                          ("d.pt", b"\x80\x02."),
                          ("e.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
                          ("f.safetensors", len(huge).to_bytes(8, "little") + huge + bytes(4))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read \(.+\)\.$"):
            read_embedding(tmp_path / name)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate((MEGABYTES << 20) + 1)
    with pytest.raises(InputError, match="has more than 256 MB; it is not an embedding"):
        read_embedding(tmp_path / "model.safetensors")


def test_how_an_embedding_was_trained_is_in_its_metadata_or_beside_it(tmp_path):
    save_embedding(tmp_path / "a.safetensors", TOKEN, rows(32), {"clip_skip": "1", "pooled_token": "end"})
    assert trained_with(tmp_path / "a.safetensors") == (1, "end")
    save_embedding(tmp_path / "a.bin", TOKEN, rows(32))
    assert trained_with(tmp_path / "a.bin") == (0, "upstream")
    (tmp_path / "options.json").write_text('{"clip_skip": 2, "pooled_token": "end"}')
    assert trained_with(tmp_path / "a.bin") == (2, "end")
    for foreign in ("[]", '{"clip_skip": [1]}', "{}"):
        (tmp_path / "options.json").write_text(foreign)
        assert trained_with(tmp_path / "a.bin") == (0, "upstream")


def test_load_embedding_takes_files_of_one_encoder_only(tmp_path):
    save_rows(tmp_path / "c.safetensors", {"clip_l": rows(32), "clip_g": rows(24)})
    with pytest.raises(InputError, match="exactly one token, but holds 2"):
        load_embedding(tmp_path / "c.safetensors")

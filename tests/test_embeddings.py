"""Embeddings: rows alone train as in the whole matrix, tokens work at inference, files load elsewhere."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from szt_utils.embedding_files import load_embedding, safe_file_name, save_embedding
from szt_utils.embeddings import (
    NewRows,
    add_embedding,
    add_placeholder,
    add_tokens,
    check_room,
    join_rows,
    ordinary_embeddings,
    ordinary_words_with,
    placeholder_prompt,
    take_rows,
    train_rows,
    with_all_vectors,
)
from szt_utils.errors import InputError
from szt_utils.notices import notice


@pytest.fixture
def parts(tiny_model):
    return (CLIPTokenizer.from_pretrained(tiny_model, subfolder="tokenizer"),
            CLIPTextModel.from_pretrained(tiny_model, subfolder="text_encoder"))


@pytest.mark.parametrize("rows", [1, 3])
def test_new_rows_equal_an_ordinary_embedding_forward_and_backward(rows):
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Embedding(10, 5)
    new = NewRows(whole.weight[:-rows], whole.weight[-rows:])
    ids = torch.randint(0, 10, (4, 7), generator=generator)
    ids[0] = torch.tensor([9, 9, 0, 10 - rows, 9 - rows, 9, 1])  # repeated, first and last new, last frozen
    assert torch.equal(new(ids), whole(ids)) and torch.equal(new.weight, whole.weight)
    weight = torch.randn(4, 7, 5, generator=generator)
    (new(ids) * weight).sum().backward()
    (whole(ids) * weight).sum().backward()
    assert torch.equal(new.rows.grad, whole.weight.grad[-rows:])
    assert [name for name, _ in new.named_parameters()] == ["rows"]
    assert torch.equal(new(ids[:, :0]), whole(ids[:, :0]))


def test_placeholder_rows_copy_the_initializer_and_nothing_else_changes(parts):
    tokenizer, text_encoder = parts
    before = text_encoder.get_input_embeddings().weight.detach().clone()
    ids = add_placeholder(tokenizer, text_encoder, "<new>", "star", 3)
    weight = text_encoder.get_input_embeddings().weight
    assert ids == list(range(len(before), len(before) + 3))
    assert len(weight) == len(tokenizer) == len(before) + 3
    assert torch.equal(weight[:-3], before)
    assert torch.equal(weight[-3:], before[tokenizer.convert_tokens_to_ids("star</w>")].expand(3, -1))
    prompt = placeholder_prompt("<new>", 3)
    assert prompt == "<new> <new>_1 <new>_2"
    assert tokenizer.encode(f"a photo of a {prompt} on sand", add_special_tokens=False)[4:7] == ids


def test_only_the_rows_of_the_text_encoder_train_and_they_go_back(parts):
    tokenizer, text_encoder = parts
    ids = add_placeholder(tokenizer, text_encoder, "<new>", "star", 2)
    tokens = tokenizer("a <new> <new>_1 on sand", return_tensors="pt").input_ids
    expected = text_encoder(tokens)[0].detach()
    new = train_rows(text_encoder, 2)
    assert [name for name, p in text_encoder.named_parameters() if p.requires_grad] == [
        name for name, p in text_encoder.named_parameters() if p is new.rows] != []
    assert torch.equal(text_encoder(tokens)[0], expected)
    with torch.no_grad():
        new.rows += 1
    trained = text_encoder(tokens)[0].detach()
    with ordinary_embeddings([text_encoder], [new.rows]):
        assert type(text_encoder.get_input_embeddings()) is torch.nn.Embedding
        assert torch.equal(text_encoder.get_input_embeddings().weight[ids], new.rows)
        assert torch.equal(text_encoder(tokens)[0], trained)
    assert text_encoder.get_input_embeddings() is new


def test_the_optimizer_of_all_rows_is_that_of_each():
    """AdamW on rows of several concepts, taken apart, is AdamW on each; joined again it goes on as before."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
    parts = [torch.nn.Parameter(whole[rows].detach().clone()) for rows in (slice(0, 2), slice(2, 5))]
    optimizers = [torch.optim.AdamW([parameter], lr=0.1) for parameter in (whole, *parts)]

    def step():
        gradient = torch.randn(5, 3, generator=generator)
        for parameter, piece in zip((whole, *parts), (gradient, gradient[:2], gradient[2:]), strict=True):
            parameter.grad = piece.clone()
        for optimizer in optimizers:
            optimizer.step()

    for _ in range(3):
        step()
    state = optimizers[0].state_dict()
    taken = [take_rows(state, rows) for rows in (slice(0, 2), slice(2, 5))]
    for ours, optimizer in zip(taken, optimizers[1:], strict=True):
        expected = optimizer.state_dict()
        assert ours["param_groups"] == expected["param_groups"]
        assert ours["state"].keys() == expected["state"].keys() == {0}
        for name, value in expected["state"][0].items():
            assert torch.equal(ours["state"][0][name], value), name
    optimizers[0] = torch.optim.AdamW([whole], lr=99)
    optimizers[0].load_state_dict(join_rows(taken))
    step()
    assert torch.equal(whole, torch.cat(parts))


def test_rows_that_are_taken_do_not_hold_all_in_memory():
    state = {"state": {0: {"exp_avg": torch.zeros(8, 4)}}, "param_groups": []}
    taken = take_rows(state, slice(2, 3))["state"][0]["exp_avg"]
    assert taken.untyped_storage().nbytes() == taken.nbytes


@pytest.mark.parametrize("placeholder, initializer, message", [
    ("star", "ring", "already contains the token 'star'"), ("<|endoftext|>", "ring", "already contains"),
    ("<Star>", "star", "capital letters.*use '<star>'"), ("two words", "star", "one word"),
    ("", "star", "one word"),
    ("<new>", "", "single token.*0 tokens"), ("<new>", "striped star", "single token.*2 tokens"),
    ("<new>", "qzx", "single token.*3 tokens"), ("<new>", "日", "single token")])
def test_tokens_that_would_not_work_are_refused(parts, placeholder, initializer, message):
    before = len(parts[0])
    with pytest.raises(InputError, match=message):
        add_placeholder(*parts, placeholder, initializer)
    assert len(parts[0]) == before == len(parts[1].get_input_embeddings().weight)


def test_a_token_that_was_added_before_is_refused(parts):
    add_placeholder(*parts, "<new>", "star", 2)
    for placeholder in ("<new>", "<new>_1"):
        with pytest.raises(InputError, match="already contains"):
            add_placeholder(*parts, placeholder, "star")


def check_caption(tokenizer, words: int) -> None:
    """`check_room` of two vectors at the end of a caption with this many words before them."""
    add_tokens(tokenizer, "<new>", "star", 2)
    check_room([tokenizer], "<new>", 2, {Path("a.png"): ("star " * words + "{}",)})


def test_a_caption_that_fills_all_tokens_is_not_cut_off(parts, capsys):
    """Of 24, one is the text's start and one its end."""
    notice.cache_clear()
    check_caption(parts[0], 20)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words, room", [(21, 1), (22, 0)])
def test_vectors_in_place_of_the_texts_end_have_no_room(parts, words, room):
    with pytest.raises(InputError, match=f"24 tokens has room for {room} at most"):
        check_caption(parts[0], words)


def test_bare_placeholders_inside_ordinary_words(parts):
    vocabulary = list(parts[0].get_vocab())
    assert "risks" in ordinary_words_with("sks", vocabulary)
    assert {"striped", "stripes"} & set(ordinary_words_with("stripe", vocabulary)) == {"striped"}
    assert ordinary_words_with("<sks>", vocabulary) == ordinary_words_with("zqx", vocabulary) == []


def test_a_token_with_its_further_vectors_stays_as_it_is():
    tokenizer = SimpleNamespace(get_added_vocab=lambda: {"<new>": 1, "<new>_1": 2})
    assert with_all_vectors(tokenizer, "a <new>") == "a <new> <new>_1"
    assert with_all_vectors(tokenizer, "a <new> <new>_1") == "a <new> <new>_1"
    assert with_all_vectors(tokenizer, "<new>", within="a <new> <new>_1") == "<new>"


def test_a_text_encoder_with_a_learned_embedding_is_frozen(parts, tmp_path):
    tokenizer, text_encoder = parts
    save_embedding(tmp_path / "a.safetensors", "<new>", torch.ones(1, 32))
    assert text_encoder.get_input_embeddings().weight.requires_grad
    add_embedding([tokenizer], [text_encoder], tmp_path / "a.safetensors")
    assert not any(parameter.requires_grad for parameter in text_encoder.parameters())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_round_trip_and_load_into_a_pipeline(tiny_model, tmp_path, suffix):
    rows = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    path = tmp_path / f"embedding.{suffix}"
    save_embedding(path, "<new>", rows, {"t_min": "500"})
    token, loaded = load_embedding(path)
    assert token == "<new>" and loaded.dtype == torch.float32 and torch.equal(loaded, rows.detach().float())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_textual_inversion(str(path))
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[-3:], loaded)
    # A prompt with the one placeholder gets all of its vectors.
    prompt = pipeline.maybe_convert_prompt("a <new> on sand", pipeline.tokenizer)
    assert prompt == "a <new> <new>_1 <new>_2 on sand"
    ids = pipeline.tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[1:4] == list(range(len(pipeline.tokenizer) - 3, len(pipeline.tokenizer)))


def test_settings_are_in_the_files_metadata(tmp_path):
    from safetensors import safe_open

    save_embedding(tmp_path / "a.safetensors", "<new>", torch.ones(1, 4), {"t_min": "500"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "t_min": "500"} and list(file.keys()) == ["<new>"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    save_embedding(path, "<new>", torch.ones(1, 4))
    before = path.read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # no file may grow past it, as on a full disk
    try:
        with pytest.raises(OSError) as caught:
            save_embedding(path, "<new>", torch.ones(10, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    for name, message in (("two.safetensors", "exactly one token, but holds 2"),
                          ("text.safetensors", "cannot be read"),
                          ("text.bin", "cannot be read"), ("empty.bin", "cannot be read"),
                          ("list.bin", "holds a list"),
                          ("none.safetensors", "cannot be read")):
        with pytest.raises(InputError, match=message) as caught:
            load_embedding(tmp_path / name)
        assert name in str(caught.value)


def test_file_names_are_safe_everywhere():
    names = {"<my-cat>": "my-cat", "sks": "sks", "<a/../b>": "a..b", "../../x": "x", "<*>": "concept",
             "<ä_1.2>": "ä_1.2"}
    assert {token: safe_file_name(token) for token in names} == names

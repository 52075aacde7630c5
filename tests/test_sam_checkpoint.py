"""Checkpoints of segment-anything: wrapped ones are understood, hostile ones use no memory."""

import argparse
import zipfile

import pytest
import torch

from szt_utils import pocket
from szt_utils.errors import InputError
from szt_utils.notices import notice
from szt_utils.sam_checkpoint import load_sam

POSITIONS = "image_encoder.pos_embed"
NECK = "image_encoder.neck.0.weight"
TOKENS = "mask_decoder.mask_tokens.weight"


@pytest.fixture(scope="module")
def state():
    return torch.load(pocket.sam_path(), weights_only=True)


@pytest.mark.parametrize("wrap", [
    lambda state: {"model": state, "epoch": 3}, lambda state: {"state_dict": state},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"state_dict": {f"sam.{name}": value for name, value in state.items()}
                   | {"loss.weight": torch.zeros(1)}},
    lambda state: {"model": {"state_dict": {f"module.{name}": value for name, value in state.items()}}}])
def test_wrapped_tensors_are_found_and_said(tmp_path, state, wrap, capsys):
    notice.cache_clear()
    torch.save(wrap(state), tmp_path / "sam.pth")
    loaded = load_sam(tmp_path / "sam.pth").state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert "the model is read from" in capsys.readouterr().err


def test_a_plain_checkpoint_keeps_its_values_and_says_nothing(tmp_path, state, capsys):
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    sam = load_sam(tmp_path / "half.pth")
    assert sam.image_encoder.pos_embed.dtype == torch.float16 and not sam.training
    assert sam.pixel_mean.device.type == "cpu" and not capsys.readouterr().err


def itself() -> dict:
    loop = {}
    loop["model"] = loop
    return loop


@pytest.mark.parametrize("change, message", [
    ({POSITIONS: torch.zeros(1).expand(1, 40_000, 40_000, 64)}, "claims more numbers than the file has"),
    ({NECK: torch.zeros(100_000, 1, 1, 1)}, "size mismatch"),
    ({TOKENS: torch.zeros(100_000, 8)}, "size mismatch"),
    ({POSITIONS: "text"}, "is no tensor"), ({7: torch.zeros(1)}, "tensors by name"),
    ({"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(7, 0)}, "zero"),
    ({"more": torch.zeros(1)}, "Unexpected key")])
def test_hostile_tensors_are_refused(tmp_path, state, change, message):
    torch.save({**state, **change}, tmp_path / "sam.pth")
    with pytest.raises(InputError, match=f"sam.pth' cannot be used .*{message}"):
        load_sam(tmp_path / "sam.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, state, value):
    positions = state[POSITIONS].clone()
    positions[0, 0, 0, 0] = value
    torch.save({**state, POSITIONS: positions}, tmp_path / "sam.pth")
    with pytest.raises(InputError, match=f"'{POSITIONS}' is not finite"):
        load_sam(tmp_path / "sam.pth")


@pytest.mark.parametrize("content, message", [
    ([1], "tensors by name"), (torch.zeros(2), "tensors by name"), ({}, "it has no"),
    (itself(), "is no tensor"),
    ({"model": {}, "args": argparse.Namespace(a=1)}, "more than tensors, and code in it is not run")])
def test_what_is_no_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "sam.pth")
    with pytest.raises(InputError, match=f"sam.pth' cannot be used .*{message}"):
        load_sam(tmp_path / "sam.pth")


def test_a_compressed_archive_is_refused(tmp_path, state):
    """A few kB may unpack to gigabytes."""
    torch.save(state, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, \
            zipfile.ZipFile(tmp_path / "sam.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(InputError, match="it is compressed"):
        load_sam(tmp_path / "sam.pth")

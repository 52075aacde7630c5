"""Pocket trainings on another device than the CPU: tensors without data, which refuse those of the CPU, stand
for a GPU's."""

import sys

import pytest
import torch
import train_encoder
import train_sam
from segment_anything.modeling import PromptEncoder


@pytest.mark.parametrize("layout", train_sam.LAYOUTS)
def test_segment_anything_is_trained_on_the_device_and_saved_for_any(layout, monkeypatch, tmp_path):
    trained = []

    def train(name, args, modules, optimizer, step_loss, averages):
        losses = step_loss(0)
        losses["loss"].backward()
        optimizer.step()
        averages["sam"].update(0)
        trained.append({value.device.type for value in losses.values()})

    def embed_points(self, points, labels, pad):  # without its masks, whose sizes are data
        return self.pe_layer.forward_with_coords(points + labels[..., None], self.input_image_size)

    monkeypatch.setattr(train_sam, "train", train)
    monkeypatch.setattr(train_sam, "LAYOUTS", [layout])
    monkeypatch.setattr(train_sam, "SHARES", [1])
    monkeypatch.setattr(PromptEncoder, "_embed_points", embed_points)
    monkeypatch.setattr(sys, "argv", ["train_sam.py", "--work_dir", str(tmp_path), "--device", "meta",
                                      "--batch_size", "2"])
    with pytest.raises(NotImplementedError, match="copy out of meta"):  # by .cpu(), before it is saved
        train_sam.main()
    assert trained == [{"meta"}] and not (tmp_path / "sam.pth").exists()


def test_fine_color_is_drawn_on_the_device_of_the_images():
    images = torch.empty(2, 3, 16, 16, device="meta")
    assert train_encoder.luminance(images).device == train_encoder.fine_color(images).device == images.device

"""Segment Anything: a checkpoint's size from its shapes, both packages behind one interface, prompts."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils import pocket
from szt_utils.errors import InputError
from szt_utils.sam_checkpoint import sam_from_state
from szt_utils.sam_prompts import SamPrompt
from szt_utils.segment import EmbeddedImage, SamCheckpoint, SamModel, load_segmenter, segment


@pytest.fixture(scope="module")
def pocket_sam():
    return load_segmenter()


@pytest.fixture(scope="module")
def scene():
    return pocket.scenes.concept_scenes("teal-striped-star", 1)[0]


def iou(a, b) -> float:
    return (a & b).sum() / (a | b).sum()


def center(mask) -> tuple[float, float]:
    """A point (x, y) well inside the mask."""
    ys, xs = np.nonzero(mask)
    return float(np.median(xs)), float(np.median(ys))


def test_one_click_a_box_and_a_second_click(pocket_sam, scene):
    embedded = pocket_sam.embed(Image.fromarray(scene.image))
    ys, xs = np.nonzero(scene.mask)
    click = SamPrompt(include=(center(scene.mask),))
    box = SamPrompt(box=(xs.min(), ys.min(), xs.max(), ys.max()))
    both = SamPrompt(include=(center(scene.mask),), exclude=((2, 2),))
    for prompt in (click, box, both):
        mask, score = segment(pocket_sam, embedded, prompt)
        assert mask.shape == scene.mask.shape and mask.dtype == torch.bool
        assert iou(mask.numpy(), scene.mask) > 0.85 and score > 0.6, prompt
    background, _ = segment(pocket_sam, embedded, SamPrompt(include=((2, 2),)))
    assert iou(background.numpy(), scene.mask) < 0.1


def test_a_click_means_the_same_place_in_a_large_wide_image(pocket_sam, scene):
    """The image is resized and padded for the model, and the mask is resized back."""
    wide = Image.new("RGB", (192, 128), tuple(int(v) for v in scene.image[0, 0]))
    wide.paste(Image.fromarray(scene.image), (0, 0))
    wide = wide.resize((384, 256))
    true = np.zeros((128, 192), bool)
    true[:, :128] = scene.mask
    true = np.asarray(Image.fromarray(true).resize((384, 256)))
    embedded = pocket_sam.embed(wide)
    assert embedded.input_size == (85, 128) and embedded.features.shape[1:] == (11, 16)
    mask, _ = segment(pocket_sam, embedded, SamPrompt(include=(center(true),)))
    assert mask.shape == (256, 384) and iou(mask.numpy(), true) > 0.7


def test_equals_the_packages_own_predictor(pocket_sam, scene):
    """Embedding, prompt and upscaling, on an image that is neither square nor of the model's size."""
    from segment_anything import SamPredictor

    image = Image.fromarray(scene.image).resize((150, 90))
    predictor = SamPredictor(pocket_sam.sam)
    predictor.set_image(np.asarray(image))
    masks, scores, _ = predictor.predict(np.array([[70, 40]]), np.array([1]), multimask_output=True)
    mask, score = segment(pocket_sam, pocket_sam.embed(image), SamPrompt(include=((70, 40),)))
    assert np.array_equal(mask.numpy(), masks[scores.argmax()])
    assert score == pytest.approx(scores.max(), abs=1e-6)
    masks, _, _ = predictor.predict(box=np.array([20, 10, 120, 80]), multimask_output=False)
    mask, _ = segment(pocket_sam, pocket_sam.embed(image), SamPrompt(box=(20, 10, 120, 80)))
    assert np.array_equal(mask.numpy(), masks[0])


@pytest.mark.parametrize("prompt, is_ambiguous", [
    (SamPrompt(include=((1, 1),)), True), (SamPrompt(include=((1, 1), (2, 2))), False),
    (SamPrompt(include=((1, 1),), exclude=((2, 2),)), False), (SamPrompt(box=(0, 0, 3, 3)), False),
    (SamPrompt(include=((1, 1),), box=(0, 0, 3, 3)), False)])
def test_only_a_single_point_without_a_box_asks_for_three_masks(prompt, is_ambiguous):
    asked = []

    class Segmenter:
        def decode(self, embedded, points, labels, boxes, multimask):
            asked.append(multimask)
            return torch.ones(1, 1, 4, 4), torch.ones(1, 1)

    segment(Segmenter(), EmbeddedImage(None, (4, 4), (4, 4), 4, None, None), prompt)
    assert asked == [is_ambiguous]


def test_the_size_of_published_checkpoints_is_inferred():
    """ViT-B, -L and -H: the package's own constructors, without memory for weights, make the same modules."""
    from segment_anything import sam_model_registry

    for kind in ("vit_b", "vit_l", "vit_h"):
        with torch.device("meta"):
            original = sam_model_registry[kind]()
            state = original.state_dict()
            rebuilt = sam_from_state(state)
        shapes = {name: value.shape for name, value in rebuilt.state_dict().items()}
        assert shapes == {name: value.shape for name, value in state.items()}
        for a, b in zip(original.modules(), rebuilt.modules(), strict=True):
            for name in ("window_size", "num_heads", "img_size", "input_image_size", "num_mask_tokens"):
                assert getattr(a, name, None) == getattr(b, name, None), (kind, name)


@pytest.mark.slow
def test_a_full_size_vit_b_of_random_weights_loads_and_runs(tmp_path, scene):
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    original = sam_model_registry["vit_b"]()
    torch.save(original.state_dict(), tmp_path / "sam_vit_b.pth")
    segmenter = SamCheckpoint(tmp_path / "sam_vit_b.pth")
    embedded = segmenter.embed(Image.fromarray(scene.image))
    assert embedded.input_side == 1024 and embedded.features.shape == (256, 64, 64)
    mask, _ = segment(segmenter, embedded, SamPrompt(include=((64, 64),)))
    assert mask.shape == (128, 128)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a checkpoint was run')",)


def test_bad_checkpoints_are_refused_and_no_code_in_them_is_executed(tmp_path):
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(Evil(), tmp_path / "evil.pth")
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    state = torch.load(pocket.sam_path(), weights_only=True)
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pth")
    for name in ("other", "evil", "noise", "empty", "more", "missing"):
        with pytest.raises(InputError, match=f"{name}.pth"):
            SamCheckpoint(tmp_path / f"{name}.pth")


def test_text_needs_a_model_that_takes_it(pocket_sam, scene):
    with pytest.raises(InputError, match="takes no text"):
        segment(pocket_sam, pocket_sam.embed(Image.fromarray(scene.image)), SamPrompt(text="star"))


@pytest.fixture(scope="module")
def transformers_sam(tmp_path_factory):
    """Tiny SAM of transformers with random weights, 64-px input."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )
    from transformers import SamModel as Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam")
    vision = SamVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64,
                             patch_size=8, output_channels=16, window_size=4, global_attn_indexes=[1],
                             mlp_dim=64, num_pos_feats=8)
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16)
    Model(SamConfig(vision_config=vision, prompt_encoder_config=prompts,
                    mask_decoder_config=decoder)).save_pretrained(folder)
    SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_transformers_sam_equals_its_own_forward(transformers_sam, scene):
    """One embedding answers every prompt; the result is that of one whole call."""
    from transformers import SamModel as Model
    from transformers import SamProcessor

    segmenter = load_segmenter(model=str(transformers_sam))
    image = Image.fromarray(scene.image).resize((120, 60))
    embedded = segmenter.embed(image)
    assert embedded.input_size == (32, 64) and embedded.input_side == 64 and not segmenter.takes_text
    model = Model.from_pretrained(transformers_sam).eval()
    processor = SamProcessor.from_pretrained(transformers_sam)
    inputs = processor(images=image, input_points=[[[60, 30]]], return_tensors="pt")
    with torch.no_grad():
        whole = model(**inputs)
    point = embedded.to_input([[(60, 30)]])
    logits, scores = segmenter.decode(embedded, point, torch.ones(1, 1), None, multimask=True)
    assert torch.allclose(logits, whole.pred_masks[0], atol=1e-4)
    assert torch.allclose(scores, whole.iou_scores[0], atol=1e-5)
    for prompt in (SamPrompt(include=((60, 30),)), SamPrompt(box=(10, 10, 90, 50)),
                   SamPrompt(include=((60, 30),), exclude=((5, 5),), box=(10, 10, 90, 50))):
        mask, _ = segment(segmenter, embedded, prompt)
        assert mask.shape == (60, 120)


def test_an_image_whose_shorter_side_vanishes_is_refused(pocket_sam, transformers_sam):
    """The bundled model's input has 128 pixels, the other one's 64."""
    for segmenter, ratio in ((pocket_sam, 256), (load_segmenter(model=str(transformers_sam)), 128)):
        for size in ((ratio + 1, 1), (3, 3 * ratio + 3)):
            with pytest.raises(InputError, match=f"^{size[0]} x {size[1]} pixels are too long and narrow"):
                segmenter.embed(Image.new("RGB", size))
        embedded = segmenter.embed(Image.new("RGB", (ratio, 1)))
        assert embedded.input_size == (1, ratio // 2)


def test_a_model_saved_in_half_precision_computes_in_float32(transformers_sam, scene, tmp_path):
    from transformers import SamModel as Model

    folder = shutil.copytree(transformers_sam, tmp_path / "half")
    Model.from_pretrained(transformers_sam).half().save_pretrained(folder)
    segmenter, image = load_segmenter(model=str(folder)), Image.fromarray(scene.image)
    mask, score = segment(segmenter, segmenter.embed(image), SamPrompt(box=(10, 10, 90, 90)))
    assert mask.shape == (128, 128) and np.isfinite(score)


def test_transformers_sam_2_equals_its_own_forward(tmp_path, scene):
    """A tiny one, random: it stretches images to a square and embeds them at several resolutions."""
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2ImageProcessor,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=16, num_attention_heads=1, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 4], global_attention_blocks=[3],
        window_positional_embedding_background_size=[7, 7])
    vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16],
                              backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32)
    model = Sam2Model(Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16),
        mask_decoder_config=Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=2,
                                                  iou_head_hidden_dim=32))).eval()
    model.save_pretrained(tmp_path)
    processor = Sam2ImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)

    segmenter = load_segmenter(model=str(tmp_path))
    image = Image.fromarray(scene.image).resize((128, 32))
    embedded = segmenter.embed(image)
    assert embedded.input_size == (64, 64) and embedded.features.shape == (32, 4, 4)
    with torch.no_grad():  # (64, 16) of the image is (32, 32) of the square
        whole = model(pixel_values=processor(image, return_tensors="pt")["pixel_values"],
                      input_points=torch.tensor([[[[32.0, 32.0]]]]), input_labels=torch.ones(1, 1, 1).int())
    point = embedded.to_input([[(64, 16)]])
    logits, _ = segmenter.decode(embedded, point, torch.ones(1, 1), None, multimask=True)
    assert torch.allclose(logits, whole.pred_masks[0], atol=1e-4)
    mask, _ = segment(segmenter, embedded, SamPrompt(include=((64, 16),), exclude=((1, 1),)))
    assert mask.shape == (32, 128)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("mask_decoder.mask_tokens.weight"), "lacks 1 weights"),
    (lambda state: state["vision_encoder.pos_embed"].fill_(torch.nan), "not finite")])
def test_missing_and_nan_weights_of_transformers_are_refused(transformers_sam, tmp_path, change, message):
    """transformers fills in what is missing with random numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(transformers_sam, tmp_path / "sam")
    state = load_file(tmp_path / "sam" / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "sam" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"sam' .*{message}"):
        SamModel(str(tmp_path / "sam"))


def test_code_of_a_model_folder_is_neither_run_nor_asked_about(transformers_sam, tmp_path):
    shutil.copytree(transformers_sam, tmp_path / "sam")
    (tmp_path / "sam" / "config.json").write_text(
        '{"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "sam" / "code.py").write_text("raise SystemExit('code of a model was run')")
    with pytest.raises(InputError, match="SAM family"):
        SamModel(str(tmp_path / "sam"))


def test_sam_hq_is_refused(tmp_path):
    from transformers import SamHQConfig

    SamHQConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is SAM-HQ, which is not supported; give SAM, SAM 2 or SAM 3"):
        SamModel(str(tmp_path))


def test_a_folder_that_is_no_sam_is_refused(tiny_model):
    with pytest.raises(InputError, match="SAM family"):
        SamModel(str(tiny_model))


@pytest.fixture(scope="module")
def sam_3(tmp_path_factory):
    """Tiny SAM 3 of transformers with random weights and the pocket tokenizer, biased to find
    something."""
    from transformers import CLIPTokenizer, Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam3")
    tokenizer = CLIPTokenizer.from_pretrained(pocket.model_path(), subfolder="tokenizer")
    vit = dict(model_type="sam3_vit_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
               num_attention_heads=2, image_size=56, pretrain_image_size=56, patch_size=14, window_size=2,
               global_attn_indexes=[1])
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32,
                num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    layers = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_layers=1)
    model = Sam3Model(Sam3Config(
        vision_config=dict(backbone_config=vit, fpn_hidden_size=32,
                           backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]),
        text_config=text, geometry_encoder_config=layers, detr_encoder_config=layers,
        detr_decoder_config=dict(num_queries=5, **layers),
        mask_decoder_config=dict(hidden_size=32, num_attention_heads=4)))
    torch.nn.init.constant_(model.detr_decoder.presence_head.layer3.bias, 10.0)
    model.save_pretrained(folder)
    Sam3Processor(Sam3ImageProcessor(size={"height": 56, "width": 56}, mask_size={"height": 16, "width": 16}),
                  tokenizer).save_pretrained(folder)
    return folder


def test_sam_3_segments_text_as_transformers_does(sam_3, scene):
    from transformers import AutoProcessor, Sam3Model

    image = Image.fromarray(scene.image).resize((100, 60))
    segmenter = load_segmenter(model=str(sam_3))
    mask, score = segment(segmenter, segmenter.embed(image), SamPrompt(text="star"))
    processor, model = AutoProcessor.from_pretrained(sam_3), Sam3Model.from_pretrained(sam_3).eval()
    with torch.no_grad():
        output = model(**processor(images=image, text="star", return_tensors="pt"))
    instances = processor.post_process_instance_segmentation(output, threshold=0.5,
                                                             target_sizes=[(60, 100)])[0]
    assert torch.equal(mask, instances["masks"].bool().any(0)) and mask.shape == (60, 100)
    assert score == pytest.approx(instances["scores"].max().item()) and score >= 0.5
    with pytest.raises(InputError, match="found no 'star'"):
        segmenter.segment_text(image, "star", threshold=0.99)
    with pytest.raises(InputError, match="takes only text"):
        segment(segmenter, segmenter.embed(image), SamPrompt(include=((5, 5),)))


def test_the_script_masks_by_text(sam_3, tmp_path):
    import precompute_masks

    pocket.write_concept("teal-striped-star", tmp_path / "images", count=2)
    precompute_masks.main(["--image_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "masks"),
                           "--sam_model", str(sam_3), "--text", "star"])
    segmenter = load_segmenter(model=str(sam_3))
    for path in sorted((tmp_path / "images").glob("*.png")):
        expected, _ = segmenter.segment_text(Image.open(path), "star")
        saved = np.asarray(Image.open(tmp_path / "masks" / path.name).convert("L")) > 127
        assert np.array_equal(saved, expected.numpy())

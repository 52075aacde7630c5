"""The pocket world: scenes follow from their seed, masks are exact, concepts stay novel, words are tokens."""

import hashlib
import itertools
import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from szt_utils import pocket
from szt_utils.captions import OBJECT_TEMPLATES, STYLE_TEMPLATES
from szt_utils.pocket import write_concept
from szt_utils.pocket.scenes import (
    BACKGROUNDS,
    COLORS,
    NOVEL_CONCEPTS,
    PATTERNS,
    SHAPES,
    SIZE,
    Attributes,
    caption,
    concept_scenes,
    draw_scene,
    training_attributes,
)
from szt_utils.pocket.vocabulary import CONTEXT_LENGTH, pocket_tokenizer, training_caption, words

ARROW = Attributes("red", "plain", "arrow", "sand")


def grown(mask, radius):
    """The mask, grown by a square of `radius` pixels."""
    padded = np.pad(mask, radius)
    return np.any([padded[y:y + SIZE, x:x + SIZE] for y in range(2 * radius + 1)
                   for x in range(2 * radius + 1)], axis=0)


def test_a_scene_follows_from_its_seed_alone():
    first = draw_scene(7, ARROW)
    np.random.seed(3)
    draw_scene(8, ARROW)
    again = draw_scene(7, ARROW)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, draw_scene(8, ARROW).image)
    assert first.image.shape == (SIZE, SIZE, 3) and first.image.dtype == np.uint8
    assert first.mask.shape == (SIZE, SIZE) and first.mask.dtype == bool and first.attributes == ARROW


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_exactly_where_the_object_is(shape):
    """A change of color shows in every pixel of the mask and else only in its soft edge and tips."""
    for seed in range(3):
        red, blue = (draw_scene(seed, Attributes(color, "plain", shape, "sand"))
                     for color in ("red", "blue"))
        changed = (red.image != blue.image).any(-1)
        assert np.array_equal(red.mask, blue.mask)
        assert changed[red.mask].all() and not changed[~grown(red.mask, 2)].any()
        assert 0.03 < red.mask.mean() < 0.45
        if shape != "hourglass":  # its corners are 1.24 radii out and sometimes leave the image
            assert not red.mask[[0, -1]].any() and not red.mask[:, [0, -1]].any()


def test_the_background_alone_changes_outside_and_the_shadow_darkens():
    sand, night = (draw_scene(0, Attributes("red", "plain", "circle", background))
                   for background in ("sand", "night"))
    assert np.array_equal(sand.mask, night.mask)
    inside = sand.mask & ~grown(~sand.mask, 1)
    assert np.array_equal(sand.image[inside], night.image[inside])
    assert (sand.image != night.image).any(-1)[~grown(sand.mask, 1)].mean() > 0.95


@pytest.mark.parametrize("color", COLORS)
def test_a_plain_object_has_its_color(color):
    scene = draw_scene(1, Attributes(color, "plain", "circle", "stone"))
    inside = scene.mask & ~grown(~scene.mask, 2)
    assert np.abs(scene.image[inside].mean(0) - COLORS[color]).max() < 8
    distances = {name: np.linalg.norm(scene.image[inside].mean(0) - rgb) for name, rgb in COLORS.items()}
    assert min(distances, key=distances.get) == color


def test_patterns_have_two_tones_but_plain():
    for color, pattern in itertools.product(COLORS, PATTERNS):
        scene = draw_scene(2, Attributes(color, pattern, "square", "sky"))
        inside = scene.image[scene.mask & ~grown(~scene.mask, 2)].astype(float)
        spread = np.linalg.norm(inside - np.median(inside, axis=0), axis=1)
        assert (spread.max() > 80) == (pattern != "plain"), (color, pattern)


def test_the_tables_are_those_of_the_world():
    sizes = [len(table) for table in (SHAPES, COLORS, PATTERNS, BACKGROUNDS, NOVEL_CONCEPTS)]
    assert sizes == [12, 12, 4, 8, 10]
    for name, (color, pattern, shape) in NOVEL_CONCEPTS.items():
        assert name == f"{color}-{pattern}-{shape}"
        assert color in COLORS and pattern in PATTERNS and shape in SHAPES
    every = itertools.chain(SHAPES, COLORS, PATTERNS, BACKGROUNDS)
    assert max(Counter(every).values()) == 1, "a word means one thing"
    for wrong in (Attributes("gold", "plain", "star", "sand"), Attributes("red", "plain", "star", "moon")):
        with pytest.raises(ValueError, match="not in the pocket world; choose from"):
            draw_scene(0, wrong)


def test_training_never_draws_a_novel_concept_and_draws_all_else_evenly():
    rng = np.random.default_rng(0)
    drawn = [training_attributes(rng) for _ in range(20_000)]
    combinations = Counter((a.color, a.pattern, a.shape) for a in drawn)
    assert not set(combinations) & set(NOVEL_CONCEPTS.values())
    assert len(combinations) == 12 * 4 * 12 - 10  # 35 draws each: each is missed with probability e^-35
    for field, table in (("color", COLORS), ("pattern", PATTERNS), ("shape", SHAPES),
                         ("background", BACKGROUNDS)):
        counts = np.array(list(Counter(getattr(a, field) for a in drawn).values()))
        assert len(counts) == len(table) and np.abs(counts / counts.mean() - 1).max() < 0.12


def test_concept_scenes_are_of_the_concept_on_differing_backgrounds():
    for name, combination in NOVEL_CONCEPTS.items():
        scenes = concept_scenes(name, 8)
        assert {(s.attributes.color, s.attributes.pattern, s.attributes.shape)
                for s in scenes} == {combination}
        assert len({s.attributes.background for s in scenes}) == 8
    digests = [[hashlib.sha256(scene.image.tobytes()).digest()
                for scene in concept_scenes("red-dotted-heart", 5, seed)]
               for seed in (0, 0, 1)]
    assert digests[0] == digests[1] and not set(digests[0]) & set(digests[2]) and len(set(digests[0])) == 5
    assert len(concept_scenes("red-dotted-heart", 11)) == 11
    with pytest.raises(ValueError, match="'red-star' is not a novel concept; choose from: teal-striped-star"):
        concept_scenes("red-star")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return pocket_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_word_of_the_world_is_one_token(tokenizer):
    vocabulary = words()
    assert {*COLORS, *PATTERNS, *SHAPES, *BACKGROUNDS, "close", "photo", "style"} <= set(vocabulary)
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in vocabulary]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(vocabulary)


def test_captions_and_templates_survive_the_tokenizer_and_fit_its_length(tokenizer):
    rng = np.random.default_rng(0)
    texts = [training_caption(training_attributes(rng), rng) for _ in range(500)]
    texts += [t.format("teal striped star") for t in OBJECT_TEMPLATES + STYLE_TEMPLATES] + [caption(ARROW)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(ids) <= CONTEXT_LENGTH == tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_unknown_words_split_into_known_pieces(tokenizer):
    for text in ("zebra", "qxz42", "<sks>", "it's a #1!"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_training_captions_drop_attributes_and_name_no_wrong_one():
    assert caption(ARROW) == "a photo of a red plain arrow on sand"
    rng = np.random.default_rng(0)
    texts = [training_caption(ARROW, rng) for _ in range(4000)]
    others = {*COLORS, *PATTERNS, *SHAPES, *BACKGROUNDS} - {"red", "plain", "arrow", "sand"}
    assert not any(others & set(text.split()) for text in texts)
    assert 0.08 < texts.count("") / 4000 < 0.12
    full = [text.split() for text in texts if text]
    for word, share in (("red", 0.85), ("plain", 0.85), ("arrow", 0.9), ("sand", 0.8)):
        assert abs(sum(word in text for text in full) / len(full) - share) < 0.03
    assert all(("arrow" in text) != ("object" in text) for text in full)


@pytest.mark.parametrize("folder", [f"{pocket.model_path()}/tokenizer", pocket.clip_path()])
def test_the_bundled_tokenizers_are_what_the_word_list_gives(folder, tmp_path):
    from transformers import CLIPTokenizer

    vocabulary = pocket_tokenizer(tmp_path).get_vocab()
    assert CLIPTokenizer.from_pretrained(folder).get_vocab() == vocabulary
    # What older transformers read, and what newer ones do.
    assert json.loads((Path(folder) / "vocab.json").read_text()) == vocabulary
    assert json.loads((Path(folder) / "tokenizer.json").read_text())["model"]["vocab"] == vocabulary
    assert (Path(folder) / "merges.txt").read_text() == (tmp_path / "merges.txt").read_text()


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "szt_utils.pocket", *map(str, arguments)],
                          capture_output=True, text=True)


def test_command_line_writes_a_concept_and_prints_nothing_but_its_paths(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    done = command("--concept", "red-dotted-heart", "--output_dir", images, "--mask_dir", masks, "--count", 3,
                   "--seed", 4)
    expected = [images / f"red-dotted-heart-{i:02d}.png" for i in range(3)]
    assert (done.returncode, done.stdout, done.stderr) == (0, "".join(f"{path}\n" for path in expected), "")
    assert sorted(images.iterdir()) == expected
    assert sorted(masks.iterdir()) == [masks / path.name for path in expected]
    for path, scene in zip(expected, concept_scenes("red-dotted-heart", 3, 4), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), scene.image)
        assert np.array_equal(np.asarray(Image.open(masks / path.name)) > 0, scene.mask)
    # Written by the library alone, the files are the same, bytes and all.
    assert [p.read_bytes() for p in write_concept("red-dotted-heart", tmp_path / "b", None, 3, 4)] == [
        path.read_bytes() for path in expected]


@pytest.mark.parametrize("arguments, code, out, err", [
    (["--list"], 0, "\n".join(NOVEL_CONCEPTS) + "\n", ""),
    (["--concept", "red-star", "--output_dir", "x"],
     f"error: 'red-star' is not a novel concept; choose from: {', '.join(NOVEL_CONCEPTS)}.", "", ""),
    (["--concept", "red-dotted-heart"], 2, "",
     "error: --concept needs --output_dir\n"),
    (["--output_dir", "x"], 2, "", "error: argument --output_dir: needs --concept\n"),
    (["--count", "3"], 2, "", "error: argument --count: needs --concept\n"),
    (["--concept", "red-dotted-heart", "--output_dir", "x", "--count", "0"], 2, "",
     "error: argument --count: 0 is not at least 1\n"),
    (["--concepts", "x", "y"], 2, "", "unrecognized arguments: --concepts x y\n")])
def test_command_line_in_this_process(monkeypatch, capsys, arguments, code, out, err, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pocket", *arguments])
    try:
        runpy.run_module("szt_utils.pocket", run_name="__main__")
        left = 0
    except SystemExit as exit:
        left = exit.code
    printed = capsys.readouterr()
    assert left == code and printed.out == out and printed.err.endswith(err) and (err or not printed.err)
    assert not list(tmp_path.iterdir())

"""Templates: the published lists of Textual Inversion, in upstream's order; and files of prompts."""

import hashlib

import pytest

from szt_utils.captions import OBJECT_TEMPLATES, STYLE_TEMPLATES, read_prompt_templates, templates_for
from szt_utils.errors import InputError


def test_lists_have_the_published_lengths_and_one_slot_each():
    assert templates_for("object") is OBJECT_TEMPLATES and len(OBJECT_TEMPLATES) == 27
    assert templates_for("style") is STYLE_TEMPLATES and len(STYLE_TEMPLATES) == 19
    for template in OBJECT_TEMPLATES + STYLE_TEMPLATES:
        assert template.count("{}") == 1 and template.format("<x>").count("<x>") == 1


def test_order_is_upstreams():
    # Digests of the lists in the Diffusers example: an edit or a swap would change every seeded run.
    def digest(templates):
        return hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]

    assert (digest(OBJECT_TEMPLATES), digest(STYLE_TEMPLATES)) == ("371f97a75395160f", "e7ec2b1750c5ab55")


def test_an_unknown_property_lists_the_choices():
    with pytest.raises(InputError, match="'person'; choose from: object, style"):
        templates_for("person")


def test_a_prompts_file_is_read_without_comments_and_in_dreambooths_notation(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# places\n\n a {} on sand \na {0} {1} in the sky\n")
    assert read_prompt_templates(path) == ["a {} on sand", "a {} in the sky"]
    for content, message in (("a {} here\nno place", "Line 2"), ("a {} and a {}", "Line 1"),
                             ("a {} {here}", "Line 1"), ("# none", "holds no prompt")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_prompt_templates(path)
    with pytest.raises(InputError, match="does not exist"):
        read_prompt_templates(tmp_path / "none.txt")

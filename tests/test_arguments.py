"""Numbers on a command line: what is taken, and the sentence for what is not."""

from argparse import ArgumentTypeError

import pytest

from szt_utils.arguments import number


@pytest.mark.parametrize("kind,options,text,value", [
    (int, dict(lowest=1), "1", 1), (int, dict(lowest=0, highest=255), "255", 255),
    (float, dict(lowest=0, highest=1), "0", 0.0), (float, dict(lowest=0, highest=1, above=True), "1", 1.0),
    (float, dict(lowest=0, above=True), "1e-30", 1e-30), (int, dict(lowest=-5), "-5", -5)])
def test_the_ends_of_a_range_belong_to_it(kind, options, text, value):
    found = number(kind, **options)(text)
    assert found == value and type(found) is kind


@pytest.mark.parametrize("kind,options,text,message", [
    (int, dict(lowest=1), "0", "0 is not at least 1"),
    (int, dict(lowest=1, highest=100), "101", "101 is not at least 1 and at most 100"),
    (int, dict(lowest=0, unit=" of levels"), "1.5", "'1.5' is not a whole number of levels"),
    (float, dict(lowest=0, above=True), "0", "0 is not above 0"),
    (float, dict(lowest=0, highest=1, above=True), "1.01", "1.01 is not above 0 and at most 1"),
    (float, dict(lowest=0), "nan", "'nan' is not a number"),
    (float, dict(lowest=0), "inf", "'inf' is not a number"),
    (float, dict(lowest=0), "one", "'one' is not a number")])
def test_the_rest_is_told_in_a_sentence(kind, options, text, message):
    with pytest.raises(ArgumentTypeError) as caught:
        number(kind, **options)(text)
    assert str(caught.value) == message

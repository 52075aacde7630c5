"""Numbers on a command line: what is taken, and the sentence for what is not."""

import io
import math
import os
import sys
import warnings
from argparse import ArgumentTypeError

import pytest

from szt_utils.arguments import (
    add_data_flags,
    add_diffusers_flags,
    add_family_flags,
    add_memory_flags,
    add_safe_zone_flags,
    number,
    script_parser,
    seed,
    user_path,
)


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
    (float, dict(lowest=0), "one", "'one' is not a number"),
    (int, dict(lowest=1), "1" + "0" * 20, "1" + "0" * 20 + " is too large; the most is 2147483647"),
    (float, dict(lowest=0), "1e37", "1e37 is too large; the most is 1e+36"),
    (float, dict(lowest=-math.inf), "-1e37", "-1e37 is too large; the most is 1e+36")])
def test_the_rest_is_told_in_a_sentence(kind, options, text, message):
    with pytest.raises(ArgumentTypeError) as caught:
        number(kind, **options)(text)
    assert str(caught.value) == message


def test_seeds_are_those_of_every_library():
    assert (seed("0"), seed("4294967295")) == (0, 2**32 - 1)
    for text in ("-1", "4294967296"):
        with pytest.raises(ArgumentTypeError, match="is not at least 0 and at most 4294967295"):
            seed(text)


def test_paths_begin_at_home_and_are_never_empty(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [user_path(text) for text in ("~/a", "~", "a/~", "openai/clip", "/a b", "b/", "//", "D:/")] == [
        "/home/me/a", "/home/me", "a/~", "openai/clip", "/a b", "b", "//", "D:/"]
    for text in ("", " ", "a\0b"):
        with pytest.raises(ArgumentTypeError, match="is not a path"):
            user_path(text)


def test_the_traceback_flag_sets_no_argument(monkeypatch):
    monkeypatch.setenv("SZT_TRACEBACK", "")
    parser = script_parser("doc")
    assert vars(parser.parse_args([])) == {} and not os.environ["SZT_TRACEBACK"]
    assert vars(parser.parse_args(["--traceback"])) == {} and os.environ["SZT_TRACEBACK"]


def test_a_usage_error_cannot_steer_the_terminal(capsys):
    with pytest.raises(SystemExit):
        script_parser("doc").parse_args(["--a\x1b[2J"])
    assert "unrecognized arguments: --a\\x1b[2J" in capsys.readouterr().err


def test_a_terminal_of_another_encoding_is_no_error(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    script_parser("doc")
    print("\u732b", flush=True)
    assert stream.buffer.getvalue() == b"\\u732b\n"


def test_the_libraries_are_as_loud_as_the_user_has_asked_for(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "info")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    for given, is_shown in ((["default"], True), ([], False)):
        monkeypatch.setattr(sys, "warnoptions", given)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            script_parser("doc")
            warnings.warn("of another author", FutureWarning, stacklevel=1)
        assert bool(caught) == is_shown
    assert (os.environ["DIFFUSERS_VERBOSITY"], os.environ["TRANSFORMERS_VERBOSITY"]) == ("info", "error")


def test_the_help_of_the_training_names_every_default():
    parser = script_parser("")
    for add in (add_safe_zone_flags, add_data_flags, add_memory_flags, add_family_flags, add_diffusers_flags):
        add(parser)
    silent = {action.dest for action in parser._actions
              if not (action.default is None or action.default is False or action.default == "==SUPPRESS=="
                      or "(default: " in action.help)}
    assert silent == {"dataloader_num_workers", "local_rank"}  # ignored, and set by launchers

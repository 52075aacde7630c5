"""Notices: one line on stderr, once, and only from the first of several processes."""

from szt_utils.notices import notice


def test_a_line_is_printed_once_and_cannot_steer_the_terminal(capsys, monkeypatch):
    for text in ("a \x1b[2J name", "a \x1b[2J name", "another"):
        notice(text)
    printed = capsys.readouterr()
    assert printed.err == "note: a \\x1b[2J name\nnote: another\n" and not printed.out
    monkeypatch.setenv("RANK", "1")
    notice("from the second process")
    assert capsys.readouterr().err == ""

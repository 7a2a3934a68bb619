import sys

from safedelta_hf.report.progress import progress_bar


def test_without_a_terminal_there_is_one_plain_line_at_the_end(capsys):
    assert list(progress_bar(range(5), desc="Reading", unit="row")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == "Reading: 5/5 row [00:00]\n"


def test_what_is_being_done_is_a_line_of_its_own_each_time_that_it_changes(capsys):
    with progress_bar(desc="Checking", unit="weight", total=4) as bar:
        for text in ("trial 1: 2.4 fails", "trial 2: 12 passes"):
            bar.update()
            bar.set_description_str(text)
            bar.set_description_str(text)
        bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "trial 1: 2.4 fails: 1/4 weight",
        "trial 2: 12 passes: 2/4 weight",
        "trial 2: 12 passes: 4/4 weight",
    ]


def test_a_bar_that_is_switched_off_says_nothing(capsys):
    assert list(progress_bar(range(5), desc="Reading", unit="row", disable=True)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress_bar(range(5), desc="Reading", unit="row")) == [0, 1, 2, 3, 4]
    shown = capsys.readouterr().err
    assert "\r" in shown and "100%" in shown


def test_nothing_to_do_is_not_told(capsys):
    assert list(progress_bar([], desc="Sorting", unit="batch")) == []
    assert capsys.readouterr().err == ""

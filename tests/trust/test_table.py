"""Tables that somebody else made, through the command: what is printed, written and refused."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rich.cells
import rich.console
import rich.text
import scipy.stats

from helpers.reports import Elements
from helpers.source_files import REPOSITORY
from helpers.studies import environment
from jax_transfer import command as commands
from jax_transfer.report import page
from jax_transfer.report.trust import trust_table
from jax_transfer.results import RankingRow, ScoreRow, TrustRow, read_rows, to_json_dict
from jax_transfer.trust import command
from jax_transfer.trust.judge import judge
from jax_transfer.trust.table import read_table

PUBLISHED = REPOSITORY.parent / "shared/cases/accuracies.csv"
K, TARGETS = 6, ("pets", "flowers", "cars")


def table(columns=("logme", "num_parameters"), targets=TARGETS, names=tuple("abcdef"), **others):
    """Returns the lines of a made-up table as dicts of text: accuracies of three targets, and columns of numbers."""
    rng, lines = np.random.default_rng(0), []
    sizes = dict(zip(names, rng.permutation(len(names)) + 1, strict=True))
    for target in targets:
        for i, name in enumerate(names):
            accuracy = 0.5 + 0.25 * i / max(len(names) - 1, 5) + 0.03 * rng.normal()
            line = {"target": target, "checkpoint": name, "accuracy": f"{accuracy:.4f}"}
            for column in columns:
                value = sizes[name] if column == "num_parameters" else accuracy + 0.05 * rng.normal()
                line[column] = f"{value:.4f}"
            lines.append({**line, **others})
    return lines


def written(path, lines):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def rows_of(out):
    return {path.stem: read_rows(path) for path in (out / "results").glob("*.jsonl")}


@pytest.fixture
def without_figures(monkeypatch):
    """Writes pages without their figures, which take most of the time."""
    monkeypatch.setattr(page, "_drawn", lambda drawings, page: iter(()))


# --- numbers


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"there is no {PUBLISHED}")
def test_published_table_gives_the_known_taus():
    evidence, notes = read_table(PUBLISHED)
    assert evidence.accuracies.shape == (11, 11) and not notes
    rows = {row.score: row for row in judge(evidence)["trust"]}
    known = {"num_parameters": (0.578, 0.512), "source_accuracy": (0.654, 0.568)}
    for score, (weighted, tau) in known.items():
        assert (rows[score].weighted_kendall, rows[score].kendall) == pytest.approx((weighted, tau), abs=5e-4)


def test_a_made_up_table_gives_the_taus_of_scipy(tmp_path):
    lines = table()
    evidence, notes = read_table(written(tmp_path / "t.csv", lines))
    assert not notes and evidence.targets == TARGETS and evidence.checkpoints == tuple("abcdef")
    rows = {row.score: row for row in judge(evidence)["trust"]}
    for score in ("logme", "num_parameters"):
        taus, weighted = [], []
        for target in TARGETS:
            own = [line for line in lines if line["target"] == target]
            pair = [[float(line[c]) for line in own] for c in (score, "accuracy")]
            taus.append(scipy.stats.kendalltau(*pair).statistic)
            weighted.append(scipy.stats.weightedtau(*pair).statistic)
        found = rows[score].kendall, rows[score].weighted_kendall
        assert found == pytest.approx((np.mean(taus), np.mean(weighted)))


def test_order_and_spaces_and_empty_lines_do_not_matter(tmp_path):
    lines = table()
    shuffled = [lines[i] for i in np.random.default_rng(1).permutation(len(lines))]
    path = written(tmp_path / "b.csv", shuffled)
    path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes().replace(b",", b" , ").replace(b"\n", b"\r\n") + b"\r\n , ,,,\r\n"
    )
    found = [judge(read_table(p)[0])["trust"] for p in (written(tmp_path / "a.csv", lines), path)]
    taus = [{row.score: row.kendall for row in rows} for rows in found]
    assert taus[0] == pytest.approx(taus[1])


def test_optional_columns_reach_the_evidence(tmp_path):
    lines = table(names=("r18/1", "r18/2", "r50/1", "r50/2", "x", "y"), spread="0.02", seeds="5")
    for line in lines:
        line["last_epoch"] = line["checkpoint"].partition("/")[2]
        line["trajectory"] = {"x": "mine", "y": "mine"}.get(line["checkpoint"], "")
        line["family"] = "nets" if line["checkpoint"] in "xy" else ""
    lines[0]["spread"] = ""
    lines[1]["seeds"] = ""
    lines[2]["seeds"] = "1"
    evidence, notes = read_table(written(tmp_path / "t.csv", lines))
    assert evidence.trajectories == ("r18", "r18", "r50", "r50", "mine", "mine")
    assert evidence.families == ("r#", "r#", "r#", "r#", "nets", "nets")
    assert evidence.num_seeds[0].tolist() == [1, 3, 1, 5, 5, 5] and math.isnan(evidence.spreads[0, 0])
    assert evidence.spreads[1].tolist() == [0.02] * 6
    assert any("lowest line in the table counts as the last epoch" in note for note in notes)
    assert any("in the checklist alone" in note for note in notes)


def test_equal_numbers_may_be_written_in_two_ways(tmp_path):
    lines = table()
    for i, line in enumerate(lines):
        line["num_parameters"] = ("1000000", "1e6", "1000000.0")[i // (len(lines) // 3)]
    evidence, _ = read_table(written(tmp_path / "t.csv", lines))
    assert set(evidence.scores["num_parameters"].ravel()) == {1e6}


# --- what is refused


def changed(index=0, drop=(), **cells):
    lines = table()
    lines[index] = {**lines[index], **cells}
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def text(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


HEADER = "target,checkpoint,accuracy,logme\n"
REFUSED = {
    "no accuracy": (changed(accuracy=""), "line 2: accuracy is empty"),
    "no name": (changed(1, checkpoint=" "), "line 3: checkpoint is empty"),
    "no column": (changed(drop=("accuracy",)), "the column accuracy is missing; target, checkpoint and accuracy"),
    "text": (changed(accuracy="high"), "line 2: accuracy is 'high': expected a number from 0 to 1."),
    "text in a score": (changed(4, logme="n/a"), "line 6: logme is 'n/a': expected a number below 1e100. Leave"),
    "a huge number": (changed(logme="1e200"), "logme is '1e200': expected a number below 1e100"),
    "infinity": (changed(logme="1e999"), "logme is '1e999': expected a number below 1e100"),
    "not a number": (changed(logme="nan"), "logme is 'nan': expected a number below 1e100"),
    "percentages": (changed(accuracy="84.06"), "accuracy is '84.06': expected a number from 0 to 1. Divide"),
    "negative": (changed(accuracy="-0.1"), "accuracy is '-0.1': expected a number from 0 to 1."),
    "a duplicate": ([*table(), table()[3]], "line 20: d on pets is in line 5 already"),
    "a spread in points": ([{**line, "spread": "1.5"} for line in table()], "spread is '1.5': expected a number"),
    "half a seed": ([{**line, "seeds": "2.5"} for line in table()], "seeds is '2.5': expected a whole number"),
    "seeds in words": ([{**line, "seeds": "three"} for line in table()], "seeds is 'three': expected a whole number"),
    "a list by target": (changed(num_parameters="99"), "num_parameters of a is"),
    "two families": (
        [{**line, "family": line["target"]} for line in table()],
        "family of a is flowers, but pets in line",
    ),
    "a single checkpoint": ([line for line in table() if line["checkpoint"] == "a"], "pets has a single checkpoint"),
    "a computed column": ([{**line, "average_rank": "1"} for line in table()], "average_rank is computed from"),
    "a pooled column": ([{**line, "pooled": "1"} for line in table()], "pooled is computed from the others"),
    "empty": ("", "is empty"),
    "spaces": ("\n \n", "is empty"),
    "a header alone": (HEADER, "has no lines below its header"),
    "a short line": (HEADER + "pets,a,0.5\n", "line 2: has 3 cells, and there are 4 columns"),
    "a column without a name": ("target,checkpoint,accuracy,\npets,a,0.5,\n", "column 4 has no name"),
    "a column twice": ("target,checkpoint,accuracy,s,s\n", "column s occurs twice"),
    "semicolons": (HEADER.replace(",", ";"), "separated by commas. The columns are target;checkpoint;accuracy;logme."),
    "a binary file": (bytes(range(256)) * 9, "is not a CSV file in UTF-8"),
    "Latin-1": (HEADER.encode() + "pets,m\xfcller,0.5,1\n".encode("latin-1"), "is not a CSV file in UTF-8"),
    "zeros": (bytes(4000), "the columns target, checkpoint and accuracy are missing"),
    "a huge cell": ("x" * 200_000, "is not a CSV file in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tables_are_refused_in_one_line(case, tmp_path, monkeypatch, capsys):
    content, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "t.csv"
    written(path, content) if isinstance(content, list) else text(path, content)
    with pytest.raises(SystemExit) as raised:
        command.main(["t.csv"])
    printed = capsys.readouterr()
    assert raised.value.code == 2 and printed.out == ""
    assert printed.err.startswith("jax-transfer trust: t.csv") and printed.err.count("\n") == 1 == len(
        printed.err.splitlines()
    )
    assert message in printed.err and len(printed.err) < 600
    assert os.listdir(tmp_path) == ["t.csv"]


@pytest.mark.parametrize("name", ("nothing.csv", ".", "a\nb.csv"))
def test_files_that_cannot_be_read_are_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main([name])
    error = capsys.readouterr().err
    assert "cannot be read" in error and error.count("\n") == 1 and not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "t.csv", table())
    for out in ("t.csv", "t.csv/out"):
        with pytest.raises(SystemExit, match="2"):
            command.main(["t.csv", f"--out={out}"])
        error = capsys.readouterr().err
        assert "cannot be written" in error and "choose another --out" in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["t.csv"]


def test_results_of_a_study_are_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "t.csv", table())
    for name, content in (("config.json", '{"name": "study"}'), ("config.json", "[1]"), ("results/transfer.jsonl", "")):
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / name).write_text(content)
        with pytest.raises(SystemExit, match="2"):
            command.main(["t.csv", "--out=w"])
        error = capsys.readouterr().err
        assert "that this command did not write: choose another folder" in error and error.count("\n") == 1
        assert (tmp_path / "w" / name).read_text() == content and len(list((tmp_path / "w").rglob("*.*"))) == 1
        shutil.rmtree(tmp_path / "w")


# --- what goes on with a note


def lines_without(**dropped):
    return [line for line in table() if not all(line[k] == v for k, v in dropped.items())]


NOTED = {
    "one target": ([line for line in table() if line["target"] == "pets"], "pets is the only target"),
    "equal accuracies": (
        [{**line, "accuracy": "0.7"} if line["target"] == "cars" else line for line in table()],
        "All accuracies on cars are equal",
    ),
    "all equal": ([{**line, "accuracy": "0.7"} for line in table()], "All accuracies on pets are equal"),
    "a score on some": (changed(2, logme=""), "logme has no value in 1 of 18 lines (c on pets), so it"),
    "no score": (
        [{**line, "logme": ""} for line in table()],
        "logme has no value in 18 of 18 lines (a on pets, b on pets, c on pets and 15 more)",
    ),
    "a missing line": (lines_without(target="cars", checkpoint="f"), "cars lacks f: it is judged by its other"),
    "two checkpoints": ([line for line in table() if line["checkpoint"] in "ab"], ""),
    "no columns": (table(()), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTED)
def test_weaker_tables_are_judged_with_a_note(case, tmp_path, monkeypatch, capsys, without_figures):
    lines, note = NOTED[case]
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "t.csv", lines)
    command.main(["t.csv", "--out=out"])
    printed = capsys.readouterr().out
    shown = Elements((tmp_path / "out/report/index.html").read_text(encoding="utf-8")).text
    assert f"Note: {note}" in " ".join(printed.split()) if note else "Note:" not in printed
    assert note in shown and "How far each score can be trusted" in shown
    words = shown[: shown.index("All results")].replace("None of", "").split()
    assert not {"None", "nan", "inf", "nan%", "NaN"} & set(words)
    assert "has not run" not in shown and "No results" not in shown


# --- the page and the terminal


STRANGE = {
    "html": "<script>alert(1)</script>",
    "markup": "[bold red]x[/bold red]",
    "unclosed": "[/]",
    "quotes": 'a "b", c',
    "long": "resnet" * 12,
    "unicode": "模型",
    "spaces": "two  words",
}
CONTROL = {"escape": ("\x1b[31mred", r"\x1b[31mred"), "break": ("a\nb", r"a\nb"), "zero": ("a\x00b", r"a\x00b")}


def test_names_are_shown_literally(tmp_path, monkeypatch, capsys, without_figures):
    names = {**{name: name for name in STRANGE.values()}, **dict(CONTROL.values())}
    monkeypatch.chdir(tmp_path)
    lines = table(names, [f"T{name}" for name in names], tuple(f"C{name}" for name in names))
    for line, name in zip(lines, names, strict=False):
        line[name] = ""  # so that a note has it
    written(tmp_path / "t.csv", lines)
    command.main(["t.csv", "--out=out"])
    html, printed = (tmp_path / "out/report/index.html").read_text(encoding="utf-8"), capsys.readouterr().out
    visible = " ".join(Elements(html).text.split())
    for shown in names.values():
        assert all(" ".join(own.split()) in visible for own in (shown, f"T{shown}", f"C{shown}"))
        assert "".join(shown.split()) in "".join(printed.split())
    assert "<script>alert" not in html and "\x1b" not in html + printed
    assert max(map(rich.cells.cell_len, printed.splitlines())) <= 80 and "…" not in printed


def test_a_page_says_all_that_the_command_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "my table.csv", table(spread="0.01", seeds="3"))
    command.main(["my table.csv"])
    out = tmp_path / "my table_trust"
    shown, printed = Elements((out / "report/index.html").read_text(encoding="utf-8")).text, capsys.readouterr().out
    rows = rows_of(out)
    assert set(rows) == {"transfer", "scores", "ranking", "trust", "checklist", "points", "predictions"}
    assert all(row["finding"] in shown for row in rows["checklist"])
    notes = json.loads((out / "config.json").read_text())["notes"]
    assert len(notes) == 1 and shown.index(notes[0]) < shown.index("Measured against the FT accuracy of 6 checkpoints")
    for words in (
        "Scores in my table.csv",
        "Whether a score earned its cost cannot be said from 6 checkpoints: at least 10 are needed.",
        "Independent studies found no score that is reliable everywhere",
        "what a gap in a score has meant",
        "a gap of",
        "plus or minus",
        "measured accuracies lie in their intervals",
        "all scores pooled",
        "Rank on other targets and All scores pooled use the accuracies on the other targets.",
    ):
        assert words.lower() in shown.lower()
    flat = " ".join(printed.split())
    assert (
        notes[0] in flat and "cannot be said from 6 checkpoints" in flat and "my table_trust/report/index.html" in flat
    )
    before = rows_of(out)
    command.main(["my table.csv"])  # again, in the same folder
    assert rows_of(out) == before


def test_terminal_table_of_many_scores_fits_into_80_columns():
    names = [f"score_{i}_{'with_a_long_name' * (i % 3)}" for i in range(40)]
    ranking = [to_json_dict(RankingRow("t", "finetune", s, *[-1.0] * 7, 100, -1.0, -0.994, 0.104, 100)) for s in names]
    scores = [to_json_dict(ScoreRow("0", 0, "t", s, 0.5, 1.0, 7.4e11, 7.4e11, "", 7.4e11)) for s in names]
    judged = [
        to_json_dict(
            TrustRow("finetune", s, 1, 100, -1, -1, "last_epoch", -1.99, -2, -1.9, *[0] * 5, 9, 0, 9, 0, 9, 0, 9)
        )
        for s in names
    ]
    for costs in (scores, []):
        console = rich.console.Console(width=80, record=True, file=io.StringIO())
        console.print(trust_table(ranking, costs, "finetune", judged=judged))
        printed = console.export_text()
        assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
        assert printed.count("-199") == 40 and all(name[:9] in printed for name in names)


# --- the commands


def run(folder, *arguments):
    """Runs the command in another process."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


def test_command_in_a_process(tmp_path):
    written(tmp_path / "good.csv", table(targets=("pets",)))
    good = run(tmp_path, "-m", "jax_transfer.trust", "good.csv")
    assert good.returncode == 0 and "How far each score can be trusted" in good.stdout and not good.stderr
    assert (tmp_path / "good_trust/report/index.html").exists()
    bad = run(tmp_path, "-c", "from jax_transfer.command import run; run()", "trust", "bad.csv")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "bad.csv: cannot be read" in bad.stderr


def test_list_of_commands_imports_nothing_heavy():
    code = (
        "import sys; from jax_transfer.command import run; run(['--help']); "
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in commands.COMMANDS)


def test_dispatch(monkeypatch, capsys):
    called = []
    monkeypatch.setitem(commands.COMMANDS, "trust", called.append)
    commands.run(["trust", "a.csv", "--out=b"])
    monkeypatch.setattr(sys, "argv", ["jax-transfer", "trust", "c.csv"])
    commands.run()
    assert called == [["a.csv", "--out=b"], ["c.csv"]]
    with pytest.raises(SystemExit, match="2"):
        commands.run(["turst"])
    assert "there is no command 'turst'; expected one of trust" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["jax-transfer"])
    commands.run()
    assert "usage: jax-transfer COMMAND" in capsys.readouterr().out

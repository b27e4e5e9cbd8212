"""The command `python -m jax_transfer.trust TABLE.csv`: judges the scores in a table of accuracies and scores."""

import argparse
import json
import math
import pathlib
import sys

import rich
from rich.text import Text

from jax_transfer import logs
from jax_transfer.records import InputError, printable
from jax_transfer.report import trust
from jax_transfer.report.page import write_report
from jax_transfer.report.tables import METHODS, listed
from jax_transfer.results import Rows, ScoreRow, TransferRow, to_json_dict, write_atomically
from jax_transfer.trust.evidence import Evidence
from jax_transfer.trust.judge import judge
from jax_transfer.trust.table import read_table

USER_ERROR = 2
PROGRAM = "jax-transfer trust"
CONFIG = "config.json"  # also tells this command's folder from that of a study
DESCRIPTION = """Says how far transferability scores can be trusted, and whether they earn their cost, from a CSV
file with a line for each target and checkpoint: target, checkpoint, accuracy in [0, 1], optionally
spread (highest minus lowest accuracy over seeds), seeds (their number, 3 by default), trajectory
(the pre-training of which the checkpoint is an epoch), family (of its architecture), and a column
for each score; higher is better. The columns num_parameters, forward_gflops, source_accuracy,
last_epoch and static are lists that need no data of the target, which a score has to beat. No model
and no images are needed."""
EXAMPLE = "example: jax-transfer trust accuracies.csv --out=trust"


def main(arguments: list[str] | None = None) -> None:
    """Reads the table, prints how far each score can be trusted, and writes the page."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument("table", type=pathlib.Path, help="the CSV file")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results and the page (default: TABLE_trust)")
    parser.add_argument(
        "--method", choices=METHODS, default="finetune", help="what the accuracies are (default: finetune)"
    )
    options = parser.parse_args(arguments)
    logs.setup()
    out = options.out or pathlib.Path(f"{options.table.stem}_trust")
    try:
        evidence, notes = read_table(options.table, options.method)
        page = write(evidence, notes, out, f"Scores in {printable(options.table.name)}")
    except InputError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except OSError as error:
        where = printable(error.filename or out)
        print(f"{PROGRAM}: {where} cannot be written ({error.strerror}): choose another --out.", file=sys.stderr)
        sys.exit(USER_ERROR)
    rows = {name: [to_json_dict(row) for row in Rows(out / "results", name).rows] for name in ("ranking", "trust")}
    rich.print(trust.trust_table(rows["ranking"], [], options.method, judged=rows["trust"]))
    for note in notes:
        rich.print(Text(f"Note: {note}"))
    rich.print(Text(f"The page: {printable(page)}"))


def write(evidence: Evidence, notes: list[str], out: pathlib.Path, title: str) -> pathlib.Path:
    """Writes the results of an evidence and the page of a study with these results; returns the path of the page.

    Files of an earlier call are replaced.

    Args:
      notes: sentences for the page.
      out: the folder, with `results/` and `report/` in it.
      title: the title of the page.

    Raises:
      InputError: if the folder holds the results of a study, which would be lost.
    """
    _check_folder(out)
    nan = math.nan
    pairs = [
        (t, i)
        for t in range(len(evidence.targets))
        for i in range(len(evidence.checkpoints))
        if evidence.expected[t, i]
    ]
    transfer = [
        TransferRow(
            evidence.checkpoints[i], None, evidence.targets[t], evidence.method, 0, nan,
            float(evidence.accuracies[t, i]), nan, 0, 0, nan, nan,
        )
        for t, i in pairs
    ]  # fmt: skip
    scores = [
        ScoreRow(evidence.checkpoints[i], None, evidence.targets[t], name, float(values[t, i]), nan, nan, nan)
        for name, values in evidence.scores.items()
        for t, i in pairs
        if math.isfinite(values[t, i])
    ]
    config = {"name": title, "notes": notes}
    write_atomically(out / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode())
    for name, rows in {"transfer": transfer, "scores": scores, **judge(evidence)}.items():
        Rows(out / "results", name).replace(rows)
    return write_report(out)


def _check_folder(out: pathlib.Path) -> None:
    """Checks that nothing is lost if the files of this command are written to a folder."""
    used = [name for name in (CONFIG, "results", "report") if (out / name).exists()]
    try:
        config = json.loads((out / CONFIG).read_bytes()) if used else {"notes": []}
    except (OSError, ValueError):
        config = {}
    if not isinstance(config, dict) or "notes" not in config:
        raise InputError(
            f"--out={printable(out)} has {listed(used)} that this command did not write: choose another folder."
        )

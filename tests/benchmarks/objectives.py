"""Writes how well the frozen features of each objective do beside random ones, from studies that judge every epoch.

    python tests/benchmarks/objectives.py OUTPUT.md WORKDIR [WORKDIR ...] --command="..." [--command="..." ...] \\
        [--note="..."]

For each study: the command that made it; a table with the k-NN accuracy of every epoch, the effective
rank, alignment and uniformity of the last one; the accuracy of a probe on each target, at epoch 0 and at the last one,
with half of the spread over the seeds; and whether the last one is ahead by more than that spread.
"""

import argparse
import json
import pathlib

from record_study import markdown

from jax_transfer.report import best
from jax_transfer.report.tables import is_number, method_name, percent, target_names
from jax_transfer.results import read_rows

SHOWN = 12  # epochs in a table, at most
HEAD = """# What frozen features learn from each objective

Made by `tests/benchmarks/objectives.py` from the result rows of the studies below.

- A probe is marked "(not ahead)" if its last epoch is not above the random initialisation by more than the larger
  spread over the probe's seeds. That is no proof that nothing was learned: with few images the spread is large. A
  converged probe (`probe_converged`) is the same for all seeds, so that its spread is 0.
- Alignment is that of views with the augmentations of each pre-training: weaker ones make it smaller, so it compares
  epochs of a pre-training, not pre-trainings.
- Pre-training has one seed. Epochs are equal in images, not in work: two views, patches or copies take longer.
"""


def curves(rows: list[dict]) -> list[dict]:
    """Returns the table of k-NN accuracies: a row for each pre-training, a column for each epoch."""
    table = []
    for name, trajectory in best.trajectories(rows).items():
        epochs = [row["epoch"] for row in trajectory]
        shown = epochs if len(epochs) <= SHOWN else [e for e in epochs if e % 2 == 0 or e == epochs[-1]]
        accuracy = {row["epoch"]: row["knn_accuracy"] for row in trajectory}
        last = trajectory[-1]
        table.append(
            {
                "Pre-training": name or trajectory[0]["objective"],
                **{f"{epoch:g}": _percent(accuracy[epoch]) for epoch in shown},
                "Effective rank": _number(last["effective_rank"], ".1f"),
                "Alignment": _number(last["alignment"], ".2f"),
                "Uniformity": _number(last["uniformity"], ".2f"),
            }
        )
    return table


def probes(rows: list[dict], objective: str) -> list[dict]:
    """Returns the table of probes: a row for each pre-training, with the first and the last epoch on each target.

    Args:
      rows: rows of results/transfer.jsonl.
      objective: the name of a pre-training that is alone, and so has none of its own.
    """
    frozen = [row for row in rows if row["method"].startswith("probe") and not row["error"]]
    names, table = target_names(dict.fromkeys(row["target"] for row in frozen)), {}
    several = len({row["method"] for row in frozen}) > 1
    for (target, name, method), trained in _grouped(frozen).items():
        label = (name or objective) + (f", {method_name(method)}" if several else "")
        first, last = ([row["accuracy"] for row in trained if row["epoch"] == epoch] for epoch in _ends(trained))
        spread = max(max(x) - min(x) for x in (first, last))
        gain = sum(last) / len(last) - sum(first) / len(first)
        table.setdefault(label, {"Pre-training": label})[names[target]] = f"{_mean(first)} -> {_mean(last)}" + (
            "" if gain > spread else " (not ahead)"
        )
    return list(table.values())


def _grouped(rows: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["checkpoint"].rpartition("/")[0], row["method"]), []).append(row)
    return groups


def _ends(rows: list[dict]) -> tuple[float, float]:
    epochs = [row["epoch"] for row in rows]
    return min(epochs), max(epochs)


def _mean(values: list[float]) -> str:
    """Formats accuracies as their mean and half of their spread, in percent."""
    return f"{100 * sum(values) / len(values):.1f} ± {50 * (max(values) - min(values)):.1f}"


def _percent(value) -> str:
    return percent(value, "") if is_number(value) else "-"


def _number(value, form: str) -> str:
    return format(value, form) if is_number(value) else "-"


def section(workdir: pathlib.Path, command: str) -> str:
    """Writes the section of a study."""
    config = json.loads((workdir / "config.json").read_text())
    pretrain, transfer = (read_rows(workdir / f"results/{name}.jsonl") for name in ("pretrain", "transfer"))
    minutes = sum(row["seconds"] for row in pretrain if is_number(row["seconds"])) / 60
    return (
        f"## {config['name']}\n\n```bash\n{command}\n```\n\n{_net(config['model'])} on `{config['source']['dataset']}` "
        f"at {config['preprocessing']['image_size']} pixels, {config['pretrain']['epochs']} epochs; pre-training took "
        f"{minutes:.0f} min.\n\nk-NN accuracy on held-out source images by epoch, in percent (epoch 0 is the random "
        f"initialisation), and the last epoch's representation:\n\n{markdown(curves(pretrain))}\nA linear probe on "
        "frozen features, at epoch 0 -> at the last epoch, mean ± half of the spread over seeds, in percent:\n\n"
        f"{markdown(probes(transfer, config['pretrain']['objective']))}"
    )


def _net(model: dict) -> str:
    """Names a net and its width."""
    return model["name"] + (f" of width {model['width']:g}" if model.get("width") else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--command", action="append", required=True, help="the command of each study, in their order")
    parser.add_argument("--note", default="", help="what to know when reading the tables")
    flags = parser.parse_args()
    sections = [section(*each) for each in zip(flags.workdirs, flags.command, strict=True)]
    flags.output.write_text(
        "\n".join([HEAD, *([f"{flags.note.strip()}\n"] if flags.note else []), *sections]), encoding="utf-8"
    )
    print(flags.output)


if __name__ == "__main__":
    main()

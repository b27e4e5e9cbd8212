"""Copies the results of a study to a folder in docs/results, with a README that compares them with the paper's.

    python tests/benchmarks/record_study.py WORKDIR OUTPUT --command="..." --device="..." [--note="..."]

The folder receives config.json, the result rows, the figures and the page. The README states the command and the
device, which is the current JAX device by default.
"""

import argparse
import json
import pathlib
import shutil

from jax_transfer import devices
from jax_transfer.report import best, fewshot, reuse, reuse_tables, tables
from jax_transfer.report import spectral as report_spectral
from jax_transfer.report.comparison import comparison_rows, comparisons
from jax_transfer.results import read_rows


def markdown(rows: list[dict]) -> str:
    """Formats rows as a markdown table."""
    if not rows:
        return "None.\n"
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]) + "\n"


def _answer(transfer_rows: list[dict]) -> str:
    """Formats the comparison of given checkpoints, if there are any, and that of the study's own epochs."""
    by_name, by_epoch = comparison_rows(comparisons(transfer_rows)), best.summary_rows(transfer_rows)
    return "\n".join(map(markdown, filter(None, (by_name, by_epoch)))) or markdown([])


def _reuse(results: dict) -> str:
    """Formats the ways of reusing source data for each checkpoint, as on the page; "" without any."""
    parts = []
    for found in reuse.collect(results.get("reuse", [])):
        names = tables.target_names(list(found.points))
        for target, sentence in reuse.sentences(found).items():
            parts.append(f"**{names[target]}.** {sentence}\n".replace("\N{NO-BREAK SPACE}", " "))
        for heading, titles in reuse_tables.columns(list(found.points), names):
            table = reuse_tables.mean_table(found, titles, reuse_tables.ways_in(found, list(titles), {}))
            parts.append(f"{heading}, mean of the seeds ± half of the spread:\n\n{markdown(table.rows)}")
    return "\n".join(parts)


def _few_shot(rows: list[dict]) -> str:
    """Formats the few-shot classifiers of each target and method: what is chosen, and Table 4; "" without any."""
    parts = []
    for (target, method, metric), own in fewshot.groups(rows).items():
        parts.append(
            f"**{tables.short_target(target)}: {fewshot.METHODS[method]}.** {fewshot.conditions(own, metric)}\n"
        )
        if own[0]["num_seen"]:
            parts.append(markdown(fewshot.choice_rows(own)))
        parts.append(markdown(fewshot.shots_table(own, fewshot.column_of(own))[0]))
    return "\n".join(parts)


def _stages(rows: list[dict]) -> list[dict]:
    """Formats the time and memory of each stage."""
    return [
        {
            "Stage": row["stage"],
            "Minutes": f"{row['seconds'] / 60:.1f}",
            "Of it compiling, s": f"{row['compile_seconds']:.0f}",
            "Host memory so far, GB": f"{row['host_gigabytes']:.1f}",
        }
        for row in rows
    ]


def readme(config: dict, results: dict, command: str, device: str, note: str) -> str:
    """Writes the text of the README."""
    images = sum(row["seconds"] for row in results.get("pretrain", []) if tables.is_number(row["seconds"]))
    finetuned = results.get("reuse") or [r for r in results.get("transfer", []) if r["method"] == "finetune"]
    tuned = sum(row["seconds"] for row in finetuned if not row["error"])
    # All rows of a checkpoint repeat the time of its tuning.
    imprinted = {(r["checkpoint"], r["target"], r["method"]): r["seconds"] for r in results.get("fewshot", [])}
    tuned += sum(imprinted.values())
    stories = "\n".join(f"- **{name}.** {words}" for name, words in report_spectral.story(results))
    plain = "transfer" in results and "reuse" not in results
    why, paper = report_spectral.table_1(results), config.get("paper") or []
    parts = {
        "Comparison with the paper": markdown(report_spectral.paper_rows(results, paper)) if paper else "",
        "Which checkpoint transfers best": _answer(results["transfer"]) if plain else "",
        "New classes from a few images": _few_shot(results.get("fewshot", [])),
        "Reusing source data": _reuse(results),
        "Why": f"{stories}\n\n{markdown(why)}" if why else "",
        "Time and memory": markdown(_stages(results.get("usage", []))),
    }
    head = (
        f"# {config['name']}\n\n    {command}\n\nRan on {device}; pre-training took {images / 60:.1f} min, fine-tuning "
    )
    head += f"{tuned / 60:.1f} min. {note}\n\nThe page with all figures is [`report/index.html`](report/index.html). "
    head += "The rows are in [`results/`](results), and the configuration in [`config.json`](config.json).\n"
    body = "".join(f"\n## {title}\n\n{text}" for title, text in parts.items() if text)
    figures = [
        f"\n![{name}](report/figures/{name})\n"
        for name in sorted(path.name for path in (pathlib.Path(config["workdir"]) / "report/figures").glob("*.svg"))
        if name.startswith(
            "reuse" if "reuse" in results else ("compared", "transfer_curves", "components", "tsne", "fewshot")
        )
    ]
    return head + body + ("\n## Figures\n" + "".join(figures) if figures else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--command", required=True)
    parser.add_argument("--device", default=None)
    parser.add_argument("--note", default="")
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    for part in ("results", "report"):
        shutil.copytree(flags.workdir / part, flags.output / part, dirs_exist_ok=True)
    shutil.copy(flags.workdir / "config.json", flags.output)
    config = json.loads((flags.workdir / "config.json").read_text())
    results = {path.stem: read_rows(path) for path in sorted((flags.workdir / "results").glob("*.jsonl"))}
    results = best.by_metric(results)
    device = flags.device or devices.description()
    text = readme({**config, "workdir": str(flags.workdir)}, results, flags.command, device, flags.note)
    (flags.output / "README.md").write_text(text, encoding="utf-8")
    print(flags.output / "README.md")


if __name__ == "__main__":
    main()

"""Turns the rows of results/usage.jsonl into a table: what each stage took."""

from collections.abc import Sequence

from jax_transfer.logs import duration
from jax_transfer.report.tables import EN_DASH, is_number
from jax_transfer.results import Row


def used_rows(rows: Sequence[Row]) -> list[Row]:
    """Formats what each stage took in all of its finished runs: one dict per stage, column title -> text or integer.

    >>> row = {"stage": "probe", "seconds": 60.0, "compile_seconds": 5.0, "num_programs": 2, "host_gigabytes": 1.5,
    ...        "device_gigabytes": None}
    >>> (cells,) = used_rows([{**row, "run": 1}, {**row, "run": 2}])
    >>> cells["Runs"], cells["Time"], cells["Host memory (GB)"], cells["Device memory (GB)"]
    (2, '2 min', '1.5', '–')
    """
    table = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        table.append(
            {
                "Stage": stage,
                "Runs": len(own),
                "Time": duration(sum(row["seconds"] for row in own)),
                "Compiling": duration(sum(row["compile_seconds"] for row in own)),
                "Programs": sum(row["num_programs"] for row in own),
                "Host memory (GB)": _peak(own, "host_gigabytes"),
                "Device memory (GB)": _peak(own, "device_gigabytes"),
            }
        )
    return table


def _peak(rows: Sequence[Row], column: str) -> str:
    peaks = [row[column] for row in rows if is_number(row[column])]
    return f"{max(peaks):.1f}" if peaks else EN_DASH

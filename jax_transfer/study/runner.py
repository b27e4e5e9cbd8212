"""Runs a study from its config to its report."""

import functools
import json
import pathlib

from jax_transfer import devices, preemption, usage
from jax_transfer.fields import StudyConfig, to_json
from jax_transfer.logs import log
from jax_transfer.records import InputError
from jax_transfer.results import Rows, UsageRow, lock_workdir, write_atomically
from jax_transfer.study import checks, plan, report
from jax_transfer.study.config import differences, with_earlier_entries
from jax_transfer.study.stages import STAGES
from jax_transfer.study.workspace import Workspace
from jax_transfer.usage import Usage

# Where training steps do not fit, `training.loop` names other fields.
MEMORY_ADVICE = (
    "resume with a smaller config.data.eval_batch_size, config.data.resident_gigabytes or "
    "config.data.features_gigabytes."
)


def run(config: StudyConfig, workdir: str | pathlib.Path) -> pathlib.Path:
    """Runs the stages that a config names. Results that the working directory already holds are not computed again.

        from configs.quickstart import get_config
        from jax_transfer import study

        config = get_config("smoke")
        config.pretrain.epochs = 3
        results = study.run(config, "runs/smoke")

    Returns:
      The folder of the result files, `workdir/results`. The page is `workdir/report/index.html`.

    Raises:
      InputError: if the config, the data or the working directory cannot be used; the message is one line.
      preemption.Preempted: after SIGTERM, once the state of training is saved.
    """
    workdir = pathlib.Path(workdir)
    checks.check(config)
    lock = open_workdir(config, workdir)
    devices.use_compilation_cache(workdir / "compilation_cache")
    work = Workspace(config, workdir)
    try:
        checks.check_data(work)
        report.record_targets(work)
        plan.show(work)
        for name, stage in STAGES.items():
            if name in config.stages:
                devices.wait_for_all(name)  # all processes have written the results of the previous stage
                preemption.stop_if_requested()
                log.info("Stage %s", name)
                record = functools.partial(record_usage, work.results, name)
                with devices.explain_out_of_memory(MEMORY_ADVICE), usage.reported(f"Stage {name}", record):
                    stage.run(work)
        devices.wait_for_all("end")
    finally:
        work.close()
        lock.close()
    return work.results


def record_usage(results: pathlib.Path, stage: str, used: Usage) -> None:
    """Adds a row to results/usage.jsonl with what a stage took. Only the first process writes.

    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> record_usage(folder, "probe", Usage(2.0, 1.0, 3, 0.5, None))
    >>> record_usage(folder, "probe", Usage(0.5, 0.0, 0, 0.5, None))
    >>> [(row.run, row.seconds) for row in Rows(folder, "usage").rows]
    [(1, 2.0), (2, 0.5)]
    """
    if devices.is_first_process():
        rows = Rows(results, "usage")
        run = 1 + sum(row.stage == stage for row in rows.rows)
        rows.append(UsageRow(stage, run, **vars(used)))


def has_results(workdir: pathlib.Path) -> bool:
    """Returns whether a study has come so far that its config must not change: past the checks of its data.

    >>> import tempfile
    >>> has_results(pathlib.Path(tempfile.mkdtemp()))
    False
    """
    results, checkpoints = workdir / "results", workdir / "checkpoints"
    rows = any(path.stat().st_size for path in results.glob("*.jsonl"))
    return rows or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def open_workdir(config: StudyConfig, workdir: pathlib.Path):
    """Locks a study's working directory and writes its config.

    Returns:
      The lock, see `results.lock_workdir`.

    Raises:
      InputError: if the directory cannot be locked, or if it was made with a config that gives different results.
    """
    lock = lock_workdir(workdir)
    path, new = workdir / "config.json", to_json(config)
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        different, begun = differences(old, new), has_results(workdir)
        if different and begun:
            more = f"; and {len(different) - 4} more fields" if different[5:] else ""
            shown = [field if len(field) < 200 else f"{field[:160]}..." for field in different[: 4 if more else 5]]
            raise InputError(
                f"--workdir={workdir} was made with another config: {'; '.join(shown)}{more}. "
                "Use that config again, or another --workdir."
            )
        new = with_earlier_entries(old, new) if begun else new
    if devices.is_first_process():
        write_atomically(path, json.dumps(new, indent=1, ensure_ascii=False).encode())
    return lock

"""The command line: runs a study, or ranks given checkpoints.

python -m jax_transfer.main --config=configs/quickstart.py --workdir=DIR [--config.pretrain.epochs=5 ...]
"""

import errno
import pathlib
import re
import sys
from typing import cast

import rich
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.text import Text

from jax_transfer import devices, fields, logs, preemption
from jax_transfer.preemption import Preempted
from jax_transfer.ranking import command
from jax_transfer.records import InputError, printable
from jax_transfer.report import best, comparison, grid, retrieval, reuse, trust
from jax_transfer.report.tables import target_names
from jax_transfer.results import read_rows
from jax_transfer.study import runner, unite
from jax_transfer.study.config import BY_TARGET, default_config, follow_targets

FLAGS = flags.FLAGS
USER_ERROR = 2
TIMED_OUT = 1  # the exit code of a crash, after which the scripts in launch/ retry a limited number of times


def _define_flags() -> None:
    """Defines the options of the command.

    Raises:
      InputError: if the file named by --flagfile cannot be read. `config_flags` reads it while it defines its flag.
    """
    if "config" in FLAGS:  # the command has already run in this process
        return
    try:
        config_flags.DEFINE_config_file("config", None, "The config of the study: FILE or FILE:VARIANT, see configs/.")
    except (flags.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"--flagfile cannot be used ({_last_line(error)}): expected a text file with one flag on each line."
        ) from error
    flags.DEFINE_string("workdir", None, "The directory for checkpoints, features, results and the report.")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, if several processes run this command.")
    flags.DEFINE_integer("num_processes", None, "The number of processes.")
    flags.DEFINE_integer("process_id", None, "The index of this process, from 0.")
    flags.DEFINE_boolean("distributed", False, "Find the other processes through the cluster: Cloud TPU, Slurm, GKE.")
    flags.mark_flags_as_required(["config", "workdir"])


def _main(argv) -> None:
    if len(argv) > 1:
        raise InputError(
            f"Unexpected argument {argv[1]!r}: the options are --config, --workdir and --config.FIELD=VALUE."
        )
    devices.join_processes(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id, FLAGS.distributed)
    preemption.listen()
    logs.speak_for_all(devices.is_first_process())
    config, workdir = FLAGS.config, pathlib.Path(FLAGS.workdir)
    if "unite" in config:
        _print_summary(unite.run(config, workdir))
        return
    if "stages" not in config:
        if devices.is_first_process():
            command.run(config, workdir)
        devices.wait_for_all("ranked")
        preemption.done()
        return
    results = runner.run(config, workdir)
    if devices.is_first_process():
        _print_summary(results)
    preemption.done()


def _print_summary(results: pathlib.Path) -> None:
    paths = (results / f"{name}.jsonl" for name in ("targets", "transfer", "ranking", "trust", "scores", "retrieval"))
    rows = best.by_metric({path.stem: read_rows(path) for path in paths if path.exists()})
    transfer, ranking, scored = (rows.get(name, []) for name in ("transfer", "ranking", "scores"))
    if compared := comparison.comparisons(transfer):
        rich.print(comparison.comparison_table(compared))
    if best.trajectories(transfer):
        rich.print(best.summary_table(transfer))
    for reused in reuse.collect(rows.get("reuse", [])):
        names = target_names(list(reused.points))
        for target, text in reuse.sentences(reused).items():
            rich.print(Text(f"{reused.label}, {names[target]}: {text}"))
    for table in retrieval.summary_tables(rows.get("retrieval", [])):
        rich.print(table)
    if method := trust.ground_truth(ranking):
        rich.print(trust.trust_table(ranking, scored, method, grid.swept(transfer), rows.get("trust", [])))


def run() -> None:
    """Runs the command, then exits.

    After a user error or a full disk, it prints one line and exits with USER_ERROR. The exit code is TIMED_OUT after a
    timeout, and `preemption.EXIT_CODE` after a stop on request.
    """
    logs.setup()
    try:
        _define_flags()
        app.run(_main, flags_parser=_parse_flags)
    except InputError as error:
        _fail(error)
    except Preempted:
        _fail(preemption.MESSAGE, preemption.EXIT_CODE)
    except TimeoutError as error:
        _fail(
            f"A wait timed out ({error}): is the disk or another process hanging, or was the system clock changed? "
            "Run the same command again to resume.",
            TIMED_OUT,
        )
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(
                f"{error.filename} cannot be written or read: {error.strerror}. "
                "Fix that and run the same command again to resume."
            )
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _fail(f"The disk is full: {error}. Free some space and run the same command again to resume.")


def _parse_flags(argv):
    known = {
        name: field
        for default in (command.default_config(), unite.default_config(), default_config())
        for name, field in default.to_dict().items()
    }
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config" and value and not pathlib.Path(value.split(":")[0]).is_file():
            raise InputError(f"--config={value}: there is no such file. See configs/ for the available ones.")
        if name.startswith("config."):
            fields.check_path(name, known)
    try:
        rest = FLAGS(argv)
    # Raised for a value of the wrong type, or by any error inside a config file.
    except (ArithmeticError, AttributeError, ImportError, LookupError, NameError, SyntaxError, TypeError, ValueError,
            RuntimeError, OSError, flags.Error) as error:  # fmt: skip
        message = re.sub(r"^[\w.]+Error: ", "", _last_line(error))
        # absl's errors name the flag; any other error comes from running the config file.
        file = next((argument for argument in argv if argument.lstrip("-").startswith("config=")), "--config")
        where = "" if isinstance(error, flags.Error) else f"{file}: {type(error).__name__}: "
        raise InputError(printable(where + message)) from error
    if FLAGS.config is not None and not isinstance(FLAGS.config, ConfigDict):
        raise InputError(f"--config: get_config returns a {type(FLAGS.config).__name__}; expected a ConfigDict.")
    given = {".".join(argument.lstrip("-").partition("=")[0].split(".")[:2]) for argument in argv[1:]}
    if "config.targets" in given:
        follow_targets(
            cast(fields.StudyConfig, FLAGS.config), [name for name in BY_TARGET if f"config.{name}" not in given]
        )
    return rest


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix("ERROR:: ")


def _fail(message, code: int = USER_ERROR) -> None:
    print(f"jax_transfer: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run()

"""Disturbs a small study many times, and compares its results with those of an undisturbed run.

    python tests/faults/campaign.py --faults=200 --seed=0 --workers=2 --report=docs/results/faults.md

A study is disturbed by several random FAULTS at random moments and then runs to its end. Its rows (without the columns
that measure time) and its checkpoints must then equal those of the clean run, bit for bit. A run that ends by itself
must not print a traceback.
"""

import argparse
import collections
import concurrent.futures
import ctypes
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from jax_transfer.study.stages import STAGES

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
STUDY = [
    "--config=configs/quickstart.py:smoke",
    "--config.source.dataset=embedded:digits?train=256&test=64",
    "--config.targets=('embedded:digits?train=128&test=64',)",
    "--config.preprocessing.image_size=8",
    "--config.pretrain.batch_size=32",
    "--config.pretrain.epochs=3",
    "--config.finetune.batch_size=32",
    "--config.data.eval_batch_size=64",
    "--config.spectral.embedded_images=0",
]
CLOCK = ("seconds", "images_per_second")
# A clock that jumps back and forth by up to a day, as when the time is set.
JUMPING_CLOCK = """
import random, sys, time
real, jumps = time.time, random.Random(int(sys.argv.pop(1)))
time.time = lambda: real() + jumps.uniform(-86400, 86400)
from jax_transfer import main
main.run()
"""


def environment(**variables):
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", **variables}


def start(workdir, log, *, code=("-m", "jax_transfer.main"), preexec=None):
    command, variables = [sys.executable, *code, *STUDY, f"--workdir={workdir}"], environment(OMP_NUM_THREADS="1")
    with open(log, "w") as out:
        return subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=out, stderr=out, preexec_fn=preexec)


def finish(process, log, allowed):
    """Waits for the end and returns (exit code, log); checks that the code is allowed and the log has no traceback."""
    code = process.wait(600)
    text = pathlib.Path(log).read_text()
    if code not in allowed or "Traceback" in text:
        raise AssertionError(f"exit code {code}, expected {allowed}: {text[-2000:]}")
    return code, text


def stopped_by(number, codes):
    """Returns a fault that sends a signal at a random moment of a random stage."""

    def fault(workdir, log, rng):
        process = start(workdir, log)
        stage, delay = rng.choice(list(STAGES)), rng.uniform(0, 1.5)
        while process.poll() is None and f"Stage {stage}" not in pathlib.Path(log).read_text():
            time.sleep(0.02)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(number)
        code, _ = finish(process, log, (0, *codes))
        return code != 0

    return fault


def damaged(change):
    """Returns a fault that changes files between two runs; it does not count if there is nothing to change yet."""
    return lambda workdir, log, rng: change(workdir, rng)


def torn_line(workdir, rng):
    """Truncates the last line of a result file, as a kill during the write does."""
    paths = [path for path in (workdir / "results").glob("*.jsonl") if path.stat().st_size]
    if not paths:
        return False
    path = rng.choice(paths)
    data = path.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(data[: rng.randrange(last + 1, len(data))])
    return True


def damaged_checkpoint(damage):
    """Returns a change of a file of the last checkpoint.

    If the next run needs that file, its message must name the folder to delete, which is then deleted.
    """

    def change(workdir, rng):
        epochs = sorted((path for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), key=_number)
        if len(epochs) < 2:
            return False
        path = rng.choice([path for path in epochs[-1].rglob("*") if path.is_file() and path.stat().st_size > 50])
        whole = path.read_bytes()
        path.write_bytes(damage(whole, rng))
        log = workdir.with_suffix(".advice")
        code, text = finish(start(workdir, log), log, (0, 2))
        if code == 2:
            advice = re.search(r"delete (\S+) and run again", text)
            assert advice, text[-2000:]
            # Results computed from the checkpoint stay, since it was intact at that time.
            shutil.rmtree(advice[1].rstrip("."))
        else:
            path.write_bytes(whole)
        return True

    return change


def _number(path):
    return int(path.name)


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def with_flipped_bit(data, rng):
    index = rng.randrange(len(data))
    return data[:index] + bytes([data[index] ^ 1 << rng.randrange(8)]) + data[index + 1 :]


def lost_features(workdir, rng):
    paths = list((workdir / "features").glob("*.npz"))
    if not paths:
        return False
    for path in rng.sample(paths, rng.randint(1, len(paths))):
        path.unlink()
    return True


def truncated_features(workdir, rng):
    paths = list((workdir / "features").glob("*.npz"))
    if not paths:
        return False
    path = rng.choice(paths)
    path.write_bytes(truncated(path.read_bytes(), rng))
    return True


def full_disk(workdir, log, rng):
    """Limits the size of files, so that writes fail as on a full disk."""
    size = rng.choice((2_000, 20_000, 60_000, 200_000))

    def limit_file_size():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    # The output goes through a pipe, since the limit would apply to a log file too.
    variables = environment(JAX_ENABLE_COMPILATION_CACHE="0")
    command = [sys.executable, "-m", "jax_transfer.main", *STUDY, f"--workdir={workdir}"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, preexec_fn=limit_file_size
    )
    message = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    if done.returncode == 0:
        return False
    assert done.returncode == 2 and "disk is full" in message and "Traceback" not in done.stderr, done.stderr[-2000:]
    return True


def read_only(workdir, log, rng):
    """Makes the working directory read-only, which must give an error of one line."""
    mode = workdir.stat().st_mode
    workdir.chmod(0o555)
    try:
        _, text = finish(start(workdir, log, preexec=_obey_permissions), log, (2,))
        assert "cannot be written" in text, text[-2000:]
    finally:
        workdir.chmod(mode)
    return True


def _obey_permissions():
    """Drops root's right to ignore permissions (CAP_DAC_OVERRIDE, number 1) for the program to be started."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


def jumping_clock(workdir, log, rng):
    """Runs the study with a jumping clock, until its end or a kill; exit code 1 means that a wait timed out."""
    process = start(workdir, log, code=("-c", JUMPING_CLOCK, str(rng.randrange(10**6))))
    try:
        process.wait(rng.uniform(8, 25))
    except subprocess.TimeoutExpired:
        process.kill()
    finish(process, log, (0, 1, -signal.SIGKILL))
    return True


# Name -> (fault(workdir, log, rng) that returns whether it took effect, its weight in percent).
FAULTS = {
    "kill -9": (stopped_by(signal.SIGKILL, (-signal.SIGKILL,)), 36),
    "SIGTERM": (stopped_by(signal.SIGTERM, (75,)), 22),
    "torn last line": (damaged(torn_line), 8),
    "truncated checkpoint": (damaged(damaged_checkpoint(truncated)), 6),
    "flipped bit in a checkpoint": (damaged(damaged_checkpoint(with_flipped_bit)), 6),
    "deleted features": (damaged(lost_features), 6),
    "truncated features": (damaged(truncated_features), 6),
    "full disk": (full_disk, 4),
    "read-only directory": (read_only, 2),
    "jumping clock": (jumping_clock, 4),
}


def outcome(workdir):
    """Returns the rows of each result file without times, the epochs, and the fingerprints of the checkpoints."""
    rows = {}
    for path in sorted(set((workdir / "results").glob("*.jsonl")) - {workdir / "results/usage.jsonl"}):
        lines = map(json.loads, path.read_text().splitlines())
        kept = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
        rows[path.name] = sorted(kept, key=lambda row: json.dumps(row, sort_keys=True))
    code = (
        "import sys; from jax_transfer import trees; from jax_transfer.checkpoints import load_checkpoint\n"
        "for path in sys.argv[1:]:\n"
        "    found = load_checkpoint(path); print(trees.fingerprint({'params': found.params, 'stats': found.stats}))"
    )
    epochs = sorted((path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), key=_number)
    command = [sys.executable, "-c", code, *epochs]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return rows, [path.name for path in epochs], done.stdout.split()


def one_study(seed, folder, clean, faults):
    """Runs a study with this many faults; returns the count of each fault, and the differences from the clean run."""
    rng, workdir = random.Random(seed), folder / f"study_{seed}"
    workdir.mkdir()
    log = folder / f"study_{seed}.log"
    names, weights = zip(*((name, weight) for name, (_, weight) in FAULTS.items()), strict=True)
    counts, tries = collections.Counter(), 0
    while counts.total() < faults and tries < 4 * faults:
        tries += 1
        (name,) = rng.choices(names, weights)
        try:
            counts[name] += bool(FAULTS[name][0](workdir, log, rng))
        except AssertionError as error:
            return counts, [f"seed {seed}, {workdir}, {name}: {error}"]
    finish(start(workdir, log), log, (0,))
    same = outcome(workdir) == clean
    if same:
        shutil.rmtree(workdir)
    return counts, [] if same else [f"seed {seed}: {workdir} differs from the clean run after {dict(counts)}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="total number of faults")
    parser.add_argument("--each", type=int, default=8, help="faults per study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=pathlib.Path, help="Markdown file for the counts")
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_"))
    folder.chmod(0o755)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    begun = time.time()
    finish(start(folder / "clean", folder / "clean.log"), folder / "clean.log", (0,))
    clean = outcome(folder / "clean")
    counts, losses, number = collections.Counter(), [], -(-options.faults // options.each)
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        seeds = range(options.seed, options.seed + number)
        for done in pool.map(lambda seed: one_study(seed, folder, clean, options.each), seeds):
            counts, losses = counts + done[0], losses + done[1]
            for loss in done[1]:
                print(loss, flush=True)
            print(f"{counts.total()} faults, {len(losses)} losses, {time.time() - begun:.0f} s", flush=True)
    lines = [f"| {name} | {counts[name]} |" for name in FAULTS]
    text = "\n".join(
        [
            "# Faults",
            "",
            f"`python tests/faults/campaign.py --faults={options.faults} --each={options.each} --seed={options.seed}`",
            "",
            f"{number} small studies were disturbed {counts.total()} times. Each study then ran to its end, and",
            "its rows and checkpoints were compared bit for bit with those of an undisturbed run.",
            f"**Losses: {len(losses)}.**",
            "",
            "| fault | times |",
            "|---|---|",
            *lines,
            "",
            *losses,
        ]
    )
    print(text)
    if options.report:
        _, mark, by_hand = (options.report.read_text() if options.report.exists() else "").partition("\n## ")
        options.report.write_text(text.rstrip() + "\n" + mark + by_hand)
    if not losses:
        shutil.rmtree(folder)
    sys.exit(bool(losses))


if __name__ == "__main__":
    main()

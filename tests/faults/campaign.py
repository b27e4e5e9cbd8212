"""Breaks a small study again and again, and compares what comes out with a run that nothing disturbed.

    python tests/faults/campaign.py --faults=200 --seed=0 --workers=2 --report=docs/results/faults.md

A study runs until it is done, through several faults of FAULTS at random moments; its rows (without what a clock wrote) and
its checkpoints must then be those of the clean run, bit for bit. Every message of a run that ends by itself must be one line.
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
# A clock that goes back and forth by up to a day, as when the time is set.
JUMPING_CLOCK = """
import random, sys, time
real, jumps = time.time, random.Random(int(sys.argv.pop(1)))
time.time = lambda: real() + jumps.uniform(-86400, 86400)
from jax_transfer import main
main.run()
"""


def start(workdir, log, *, code=("-m", "jax_transfer.main"), preexec=None):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *code, *STUDY, f"--workdir={workdir}"]
    with open(log, "w") as out:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=out, stderr=out, preexec_fn=preexec)


def finish(process, log, allowed):
    """Waits for the end; the exit code must be one of those allowed, and the last words no traceback."""
    code = process.wait(600)
    text = pathlib.Path(log).read_text()
    if code not in allowed or "Traceback" in text:
        raise AssertionError(f"exit code {code}, expected {allowed}: {text[-2000:]}")
    return code, text


def stopped_by(number, codes):
    """A signal at a random moment of a random stage."""

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
    """Something that happens to the files between two runs; nothing to damage yet counts as no fault."""
    return lambda workdir, log, rng: change(workdir, rng)


def torn_line(workdir, rng):
    """The last line of a result file is cut in its middle, as by a kill while it was written."""
    paths = [path for path in (workdir / "results").glob("*.jsonl") if path.stat().st_size]
    if not paths:
        return False
    path = rng.choice(paths)
    data = path.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(data[: rng.randrange(last + 1, len(data))])
    return True


def damaged_checkpoint(damage):
    """Something happens to a file of the last checkpoint. If the program needs what is lost, it must say so; its advice is
    followed."""

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
            # What was computed from the checkpoint stays: it was whole then.
            shutil.rmtree(advice[1].rstrip("."))
        else:
            path.write_bytes(whole)
        return True

    return change


def _number(path):
    return int(path.name)


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def turned(data, rng):
    """One bit is another one."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


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
    """No file may grow beyond a size; the writes fail as on a full disk."""
    size = rng.choice((2_000, 20_000, 60_000, 200_000))
    signal_off = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))  # noqa: E731  # fmt: skip
    # stdout is a file too: it gets a pipe.
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    command = [sys.executable, "-m", "jax_transfer.main", *STUDY, f"--workdir={workdir}"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, preexec_fn=signal_off
    )
    said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    if done.returncode == 0:
        return False
    assert done.returncode == 2 and "disk is full" in said and "Traceback" not in done.stderr, done.stderr[-2000:]
    return True


def read_only(workdir, log, rng):
    """Nothing can be written: said in one line."""
    mode = workdir.stat().st_mode
    workdir.chmod(0o555)
    try:
        _, text = finish(start(workdir, log, preexec=_obey_permissions), log, (2,))
        assert "cannot be written" in text, text[-2000:]
    finally:
        workdir.chmod(mode)
    return True


def _obey_permissions():
    """Root writes where it may not: drops that right (CAP_DAC_OVERRIDE, number 1) for the program to be started."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


def jumping_clock(workdir, log, rng):
    """The study runs on, to its end or to a kill, while the clock jumps; a wait may seem to last for ever (1)."""
    process = start(workdir, log, code=("-c", JUMPING_CLOCK, str(rng.randrange(10**6))))
    try:
        process.wait(rng.uniform(8, 25))
    except subprocess.TimeoutExpired:
        process.kill()
    finish(process, log, (0, 1, -signal.SIGKILL))
    return True


# What happens -> (how, how often of a hundred).
FAULTS = {
    "kill -9": (stopped_by(signal.SIGKILL, (-signal.SIGKILL,)), 36),
    "SIGTERM": (stopped_by(signal.SIGTERM, (75,)), 22),
    "torn last line": (damaged(torn_line), 8),
    "truncated checkpoint": (damaged(damaged_checkpoint(truncated)), 6),
    "flipped bit in a checkpoint": (damaged(damaged_checkpoint(turned)), 6),
    "deleted features": (damaged(lost_features), 6),
    "truncated features": (damaged(truncated_features), 6),
    "full disk": (full_disk, 4),
    "read-only directory": (read_only, 2),
    "jumping clock": (jumping_clock, 4),
}


def outcome(workdir):
    """(rows of each result file without what a clock wrote, fingerprints of the checkpoints)."""
    rows = {}
    for path in sorted((workdir / "results").glob("*.jsonl")):
        lines = map(json.loads, path.read_text().splitlines())
        kept = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
        rows[path.name] = sorted(kept, key=lambda row: json.dumps(row, sort_keys=True))
    code = (
        "import sys; from jax_transfer import trees; from jax_transfer.models import load_checkpoint\n"
        "for path in sys.argv[1:]:\n"
        "    found = load_checkpoint(path); print(trees.fingerprint({'params': found.params, 'stats': found.stats}))"
    )
    epochs = sorted((path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), key=_number)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code, *epochs], env=environment, capture_output=True, text=True, check=True
    )
    return rows, [path.name for path in epochs], found.stdout.split()


def one_study(seed, folder, clean, faults):
    """(what happened how often, differences from the clean run): a study that is broken `faults` times."""
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
    parser.add_argument("--faults", type=int, default=200, help="how many in all")
    parser.add_argument("--each", type=int, default=8, help="how many in one study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=pathlib.Path, help="a Markdown file for the figures")
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
            f"{number} small studies were disturbed {counts.total()} times. Each study then ran to its end, and its rows",
            f"and checkpoints were compared bit for bit with those of an undisturbed run. **Losses: {len(losses)}.**",
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

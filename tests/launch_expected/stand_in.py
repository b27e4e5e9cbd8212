"""Replaces python, srun, gcloud and other programs: records its arguments, then behaves as FAKE_<NAME> specifies.

FAKE_<NAME> has one word for each call, and the last word holds for all further calls: an exit code, `save` (exits with
75 on SIGTERM) or `deaf` (ignores SIGTERM). FAKE_PROCESS_<I> sets this for process I alone. gcloud prints the words of
FAKE_QUEUE, FAKE_NODE and FAKE_STATUS.
"""

import os
import pathlib
import signal
import sys
import time

name, arguments = pathlib.Path(sys.argv[0]).name, " ".join(sys.argv[1:])
folder = pathlib.Path(sys.argv[0]).parent


def next_word(key, default):
    """Returns the word of FAKE_<key> for this call."""
    words = os.environ.get("FAKE_" + key, default).split()
    count = folder / (key + ".count")
    number = count.stat().st_size if count.exists() else 0
    with count.open("a") as file:
        file.write(".")
    return words[min(number, len(words) - 1)]


if arguments.startswith("-c "):
    print(12345)
    sys.exit(0)
with (folder / "calls").open("a") as file:
    file.write(name + " " + arguments + "\n")
if name == "sudo" and "tee" in arguments:
    sys.stdin.read()
if name == "gcloud" and " list " in arguments:
    print("other-tpu\tCREATING")
    print("jax-transfer\t" + next_word("QUEUE" if "queued-resources" in arguments else "NODE", "READY"))
    sys.exit(0)
if name == "gcloud" and arguments.count("tpu_worker.sh status"):
    print("status: " + next_word("STATUS", "running").replace("_", " "))
    sys.exit(0)
process = [word.split("=")[1] for word in sys.argv if word.startswith("--process_id=")]
word = next_word("PROCESS_" + process[0] if process else name.upper(), "0")
if word in ("save", "deaf"):
    signal.signal(signal.SIGTERM, (lambda *_: sys.exit(75)) if word == "save" else signal.SIG_IGN)
    print("ready, a line", flush=True)
    (folder / ("ready" + "".join(process))).touch()
    time.sleep(20)
sys.exit(int(word))

"""How a client script is run, and what its last line says of its end: run_script.py as NVFlare starts it."""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from nvflare.client import FLModel

from conftest import REPO
from support.console import TRAINER, to_show
from support.failure import end_of_script
from support.on_site.run_script import ENDED, in_plain_types

THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=(3_000,)).start()\n"
CHILD = """import multiprocessing, time
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3_000,))
child.start()

"""
QUEUE = """import multiprocessing
queue = multiprocessing.Queue()
queue.put(bytes(1_000_000))  # more than a pipe holds, and nobody takes it

"""
AT_EXIT = "import atexit, time\natexit.register(time.sleep, 3_000)\n"
PRINTED_TRACEBACK = """
import sys, traceback
try:
    open("/no/such/cache")
except OSError:
    traceback.print_exc()
"""


@pytest.fixture
def run(tmp_path):
    """Run a script in the folder custom/ of a site's; return its status, its lines of both outputs, its own last."""
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "beside.py").write_text("def fail():\n    raise ValueError('no such thing')\n")

    def run(script, *flags, input=""):
        (tmp_path / "custom" / "script.py").write_text(script)
        command = [sys.executable, "-u", REPO / "support" / "on_site" / "run_script.py", "custom/script.py", *flags]
        (tmp_path / "input").write_text(input)
        # As NVFlare does, which reads both outputs through one pipe.
        pipes = {"stdin": (tmp_path / "input").open(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, **pipes) as process:
            try:
                code = process.wait(timeout=100)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what the script started
            *printed, last = filter(None, process.stdout.read().splitlines())  # NVFlare drops empty lines
        assert last.startswith(ENDED)
        return code, printed, last.removeprefix(ENDED)

    return run


@pytest.mark.parametrize(
    "script, status, said, end",
    [
        ("print('done')", 0, "done", "status 0"),
        ("import sys\nprint('done')\nsys.exit()", 0, "done", "status 0"),
        ("import sys\nprint('done')\nsys.exit(3)", 3, "done", "status 3"),
        ("import sys\nsys.exit('the GPU is too small')", 1, "the GPU is too small", "status 1"),
        (f"{PRINTED_TRACEBACK}sys.exit(3)", 3, "FileNotFoundError: [Errno 2]", "status 3"),
        (f"{PRINTED_TRACEBACK}sys.exit('the GPU is too small')", 1, "the GPU is too small", "status 1"),
        (f"{PRINTED_TRACEBACK}print('goes on')", 0, "goes on", "status 0"),
        ("raise ValueError('no such\\nthing')", 1, "thing", "ValueError: no such thing (script.py:1)"),
        ("\nassert 1 == 2", 1, "AssertionError", "AssertionError (script.py:2)"),
        ("import beside\nbeside.fail()", 1, "ValueError: no such thing", "ValueError: no such thing (beside.py:2)"),
        ("import json\n\njson.loads('')", 1, "json.decoder.JSONDecodeError", "JSONDecodeError: Expecting value:"),
        ("import missing_package", 1, "ModuleNotFoundError", "ModuleNotFoundError: No module named 'missing_package'"),
        ("print('no disk', end='')\nraise SystemExit(3)", 3, "no disk", "status 3"),
        (f"{THREAD}raise ValueError('no such thing')", -9, "ValueError", "ValueError: no such thing (script.py:3)"),
        (f"{CHILD}raise ValueError('no such thing')", -9, "ValueError", "ValueError: no such thing (script.py:5)"),
        (f"{QUEUE}raise ValueError('no such thing')", -9, "ValueError", "ValueError: no such thing (script.py:5)"),
        (f"{AT_EXIT}raise ValueError('no such thing')", -9, "ValueError", "ValueError: no such thing (script.py:3)"),
        (
            "import sys\nsys.stdout = open('log.txt', 'w')\nassert 0",
            1,
            "AssertionError",
            "AssertionError (script.py:3)",
        ),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt", "KeyboardInterrupt (script.py:1)"),
        ("print('?')\ninput()", 1, "EOFError", "EOFError: EOF when reading a line (script.py:2)"),
    ],
)
def test_last_line_says_how_a_script_ended(run, script, status, said, end):
    code, printed, last = run(script, input="an answer that nobody gave\n")
    assert code == status and last.startswith(end)
    assert printed[-1].startswith(said)
    if "Error" in end or end.startswith("Keyboard"):
        assert last.endswith(")") and printed.count("Traceback (most recent call last):") == 1


def test_script_finds_its_flags_and_the_modules_beside_it(run):
    script = "import sys, beside\nprint(__name__, __file__, sys.path[0])\nprint(sys.argv)"
    _, (names, flags), _ = run(script, "--note", "a b", "--shift=-1")
    name, file, folder = names.split()
    assert (name, file) == ("__main__", "custom/script.py")
    assert folder.endswith("/custom") and folder.startswith("/")
    assert flags == str(["custom/script.py", "--note", "a b", "--shift=-1"])


def test_last_line_is_not_shown_and_says_the_reason_with_what_was_printed_before_it(run):
    _, printed, end = run(f"{PRINTED_TRACEBACK}sys.exit('the GPU is too small')")
    log = [{"name": TRAINER, "levelname": "INFO", "message": line} for line in (*printed, ENDED + end)]
    assert end_of_script(log) == "its script ended with status 1: the GPU is too small"
    assert to_show(TRAINER, "INFO", ENDED + end) is None and to_show(TRAINER, "INFO", printed[-1]) == printed[-1]


def test_wrong_thing_to_send_is_told_with_the_scripts_own_line(run):
    code, _, end = run("import nvflare.client as flare\nflare.send({})")
    assert code == 1 and end.endswith("(script.py:2)")


def test_numbers_that_are_tensors_or_numpys_are_sent_as_numbers():
    metrics = {"loss": torch.tensor(0.5), "accuracy": np.float64(50), "seen": np.int64(3), "name": "it", "none": None}
    model = in_plain_types(FLModel(metrics=metrics, meta={"NUM_STEPS_CURRENT_ROUND": torch.tensor(7)}))
    assert model.metrics == {"loss": 0.5, "accuracy": 50.0, "seen": 3, "name": "it", "none": None}
    numbers = [*model.metrics.values(), model.meta["NUM_STEPS_CURRENT_ROUND"]]
    assert [type(number) for number in numbers] == [float, float, int, str, type(None), int]


def test_weights_that_are_arrays_or_lists_are_sent_as_tensors():
    weights = {"weight": np.ones(2, dtype=np.float32), "bias": [0.5], "scale": torch.ones(1)}
    params = in_plain_types(FLModel(params=dict(weights))).params
    assert all(torch.equal(params[name], torch.as_tensor(value)) for name, value in weights.items())
    assert all(isinstance(value, torch.Tensor) for value in params.values()) and params["scale"] is weights["scale"]

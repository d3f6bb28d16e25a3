"""job.main() in a process that goes on, such as a notebook's kernel: it leaves the process as it was."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import REPO, running
from stages import ENDLESS, MODEL, SMALL


def test_main_can_be_called_again_and_again_and_leaves_its_process_as_it_was(tmp_path):
    workspace = tmp_path / "workspace"
    program = Path(__file__).with_name("notebook.py")
    command = [sys.executable, program, REPO, workspace, " ".join(SMALL), " ".join(ENDLESS)]
    kernel = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert kernel.returncode == 0, kernel.stderr
    lines = kernel.stderr.splitlines()
    first, second, stopped, mistaken = (json.loads(line) for line in lines if line.startswith("{"))
    assert [line for line in lines if not line.startswith("{")] == [
        "job.py: stopped; no round was complete",
        "job.py: error: argument --lr: invalid float value: 'fast'",
    ]
    assert [run["status"] for run in (first, second, stopped, mistaken)] == [0, 0, 130, 2]
    for run in (first, second, stopped, mistaken):
        assert run["changed"] == {}
    assert running(workspace) == []

    kept = sorted(workspace.glob("hello-pt-*"))
    assert [(folder / MODEL).is_file() for folder in (*kept, workspace / "hello-pt")] == [True, True, False]
    assert "The results of the run before" not in first["output"]
    for run, folder in ((second, kept[0]), (stopped, kept[1])):
        assert f"\nThe results of the run before are kept in {folder}\n" in run["output"]
    for run in (first, second):
        assert "\nDone: 1 round on 2 sites.\n" in run["output"]

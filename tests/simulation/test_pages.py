"""The commands of README.md and docs/ that run on one machine, one after the other as a new reader runs them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from conftest import REPO, copy_repo, end_all, replace
from documentation import blocks, commands, missing_lines
from reference import distance, fedavg, images_of_sites
from stages import MODEL, ONE_THREAD

SMALL = "--train_size 100 --test_size 20"
README = (REPO / "README.md").read_text()


def test_commands_of_the_pages_run_and_readme_shows_what_they_print(online, tmp_path):
    repo = copy_repo(tmp_path / "repo")
    outputs = {}
    added = f" --workspace {tmp_path}/simulation --data_root {tmp_path}/data {SMALL}"
    try:
        for block in [*blocks(REPO / "README.md")[:1], *commands("pages")]:  # first, what README.md runs after pip
            command = block.strip().rpartition(" && ")[2].replace("/tmp/nvflare", str(tmp_path))
            if command.startswith("python job.py"):
                command += added
            run = subprocess.run(
                ["bash", "-ec", command], cwd=repo, env=os.environ | online, capture_output=True, text=True, timeout=900
            )
            assert run.returncode == 0, run.stderr
            outputs[block] = run.stdout.replace(added, "").replace(str(tmp_path), "/tmp/nvflare")
    finally:
        end_all(tmp_path)

    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    first, evaluation = (shown for language, shown in fences if not language)
    assert missing_lines(first, outputs[blocks(REPO / "README.md")[0]]) == []
    assert missing_lines(evaluation, outputs["python job.py --train_script client_with_eval.py\n"]) == []


def test_minimal_job_runs_by_itself_and_trains_as_plain_pytorch_and_a_mean_do(tmp_path):
    repo = copy_repo(tmp_path / "repo")
    (repo / "docs").mkdir()
    recipe = shutil.copy(REPO / "docs" / "minimal_job.py", repo / "docs")
    # NVFlare adds up in float32: later rounds amplify the difference in the last bits.
    replace(Path(recipe), "num_rounds=2", "num_rounds=1")
    replace(Path(recipe), "--dataset synthetic", "--dataset synthetic --train_size 100")
    env = os.environ | ONE_THREAD | {"NVFLARE_SIMULATOR_WORKSPACE_ROOT": str(tmp_path / "alone")}
    try:
        subprocess.run([sys.executable, "-m", "docs.minimal_job"], cwd=repo, env=env, check=True, timeout=900)
    finally:
        end_all(tmp_path / "repo")
    alone = torch.load(tmp_path / "alone" / "hello-pt-minimal" / MODEL, weights_only=True)["model"]
    expected = fedavg(images_of_sites([range(100)] * 2, seed=0, size=100), rounds=1, seed=0)
    assert distance(alone, expected) < 1e-6

"""The commands of README.md and docs/ that run on one machine, one after the other as a new reader runs them."""

import itertools
import os
import re
import subprocess

from conftest import REPO, copy_repo, end_all
from documentation import commands

SMALL = "--train_size 100 --test_size 20"
README = (REPO / "README.md").read_text()


def test_commands_of_the_pages_run_and_readme_shows_what_they_print(online, tmp_path):
    repo = copy_repo(tmp_path / "repo")
    outputs = {}
    try:
        for block in commands("pages"):
            command = block.strip().replace("/tmp/nvflare", str(tmp_path))
            if command.startswith("python job.py"):
                command += f" --workspace {tmp_path}/simulation --data_root {tmp_path}/data {SMALL}"
            run = subprocess.run(
                ["bash", "-ec", command], cwd=repo, env=os.environ | online, capture_output=True, text=True, timeout=300
            )
            assert run.returncode == 0, run.stderr
            outputs[block] = run.stdout.replace(str(tmp_path), "/tmp/nvflare")
    finally:
        end_all(tmp_path)

    shows = re.findall(r"^```bash\n([^`]*)```\n\n```\n([^`]*)```", README, re.MULTILINE)
    assert len(shows) == 2
    for block, shown in shows:
        printed = iter(shape(outputs[block]).splitlines())
        missing = [line for line in shape(shown).splitlines() if line not in ("", "[...]") and line not in printed]
        assert missing == []  # in this order, but for what [...] leaves out


def shape(output):
    """Return an output without its numbers, the order of the sites' lines in a round, and which model is the best."""
    output = output.replace("site-", "site").replace("The best is best_", "The best is ")
    lines = [re.sub(r" +", " ", line) for line in re.sub(r"\d[\d.,:-]*", "0", output).splitlines()]
    groups = itertools.groupby(lines, key=lambda line: line.startswith("site0 round"))
    return "\n".join(line for of_sites, group in groups for line in (sorted(group) if of_sites else group))

"""README.md and docs/ against the program: commands are run, links lead somewhere, the lines shown are client.py's."""

import re
import subprocess
import sys

import pytest

from conftest import REPO
from documentation import PAGES, blocks, commands, suite_of

NOT_OF_A_BLOCK = {  # commands in the text
    "python3 -m venv .venv",  # .ci/run
    "source .venv/bin/activate",  # .ci/run sets PATH
    "python job.py --help",  # test_command_line.py
    "python job.py --ratio 10",  # test_own_model.py
}
README = (REPO / "README.md").read_text()
(DIFF,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
CLIENT = (REPO / "client.py").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_by_some_suite(page):
    assert all(suite_of(page, block) for block in blocks(page))
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`((?:python3?|nvflare|pip|tensorboard|source|bash|git) [^`]+)`", text.replace("\n", " "))
    everywhere = "".join(block for page in PAGES for block in blocks(page))
    assert [command for command in inline if command not in everywhere and command not in NOT_OF_A_BLOCK] == []


def test_every_command_of_real_sites_is_taken_by_a_test():
    tests = "".join(test.read_text() for test in (REPO / "tests" / "federation").glob("*.py"))
    taken = re.findall(r'command\("docs/real-sites.md", "(.+?)"\)', tests)
    assert all(any(words in block for words in taken) for block in commands("federation"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            name, _, heading = target.partition("#")
            file = (page.parent / name) if name else page
            assert file.exists(), target
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if heading else []
            anchors = [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings]
            assert not heading or heading in anchors, target


def test_readme_is_short_and_the_picture_light():
    assert README.count("\n") <= 220
    assert (REPO / "docs" / "round.svg").stat().st_size <= 30_000


def test_diff_of_the_readme_shows_client_py_with_each_flare_line_and_explains_it():
    rest = iter(line.strip() for line in CLIENT.splitlines())
    shown = [line[1:].strip() for line in DIFF.splitlines() if not line.startswith("-")]
    imports, main = shown[:3], shown[4:]
    assert set(imports) <= {line.strip() for line in CLIENT.splitlines()}
    assert [line for line in main if line and line not in rest] == []
    numbers = [int(number) for number in re.findall(r"# \((\d+)\)", CLIENT)]
    assert [int(number) for number in re.findall(r"# \((\d+)\)", DIFF)] == sorted(numbers)
    table = README.partition("| | what it does |")[2].partition("\n\n")[0]
    explained = [int(n) for numbers in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for n in numbers.split(",")]
    assert sorted(explained) == sorted(numbers)


def test_other_side_of_the_diff_is_a_script_that_trains_without_nvflare(tmp_path):
    main = DIFF.partition("\n ...\n")[2]
    lines = [line[1:].strip() for line in main.splitlines() if not line.startswith("+")]
    body = "".join(f"    {line}\n" if line else "\n" for line in lines[1:])
    before, _, after = CLIENT.partition("def main():\n")
    before = before.replace("import nvflare.client as flare  # (1) the Client API\n", "")
    before = re.sub(
        "from nvflare.client.tracking import .*", "from torch.utils.tensorboard import SummaryWriter", before
    )
    script = f"{before}{lines[0]}\n{body}\n{after[after.index('if __name__') :]}"
    script = re.sub(r"  # \(\d+\).*", "", script)
    assert "nvflare" not in script.partition('"""\n')[2] and "flare." not in script
    (tmp_path / "plain.py").write_text(script)
    command = [sys.executable, tmp_path / "plain.py", "--dataset", "synthetic", "--train_size", "64", "--epochs", "2"]
    env = {"PYTHONPATH": str(REPO), "PATH": ""}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"(here  epoch [12]/2  loss 2\.\d{4}  \d+ s\n){2}", run.stdout)
    assert (tmp_path / "model.pt").exists()

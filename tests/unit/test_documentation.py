"""README.md and docs/ against the program: commands are run, links lead somewhere, the lines shown are client.py's."""

import argparse
import ast
import inspect
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from client import train
from conftest import REPO, data_flags
from data import add_data_flags, load_data, make_loader
from documentation import PAGES, blocks, commands, diff_of_clients, suite_of
from model import create_model
from wine import WINE, load_module

NOT_OF_A_BLOCK = {  # commands in the text
    "python job.py --dataset synthetic",  # nearly every test
    "python job.py --help",  # test_command_line.py
    "python job.py --ratio 10",  # test_own_model.py
}
README = (REPO / "README.md").read_text()
OWN = (REPO / "docs" / "own-model-and-data.md").read_text()
REFERENCE = (REPO / "docs" / "reference.md").read_text()
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


def test_every_command_of_own_model_and_data_is_taken_by_a_test():
    taken = re.findall(r'flags_of\("(.+?)"\)', (REPO / "tests" / "wine.py").read_text())
    assert all(any(words in block for words in taken) for block in commands("own_model"))


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


def test_readme_is_short_the_pages_are_no_book_and_the_picture_is_light():
    assert README.count("\n") <= 260
    assert sum(len(page.read_text().split()) for page in PAGES[1:]) <= 5_500
    assert (REPO / "docs" / "round.svg").stat().st_size <= 30_000


def test_every_flag_is_explained_in_reference_and_no_other():
    help = subprocess.run([sys.executable, REPO / "job.py", "--help"], capture_output=True, text=True, check=True)
    flags = set(re.findall(r"--\w[\w-]*", help.stdout)) - {"--help", "--flag"}
    assert {"--n_clients", "--cross_site_eval", "--export-dir"} <= flags
    table = REFERENCE.partition("| flag | default | meaning |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(--[\w-]+)", table, re.MULTILINE)) == flags


def test_reference_names_the_flags_that_every_client_script_gets():
    section = REFERENCE.partition("### Which flags a client script gets")[2].partition("\n#")[0]
    parser = argparse.ArgumentParser(add_help=False)
    add_data_flags(parser)
    of_data = {action.option_strings[0] for action in parser._actions}
    wanted = set(re.findall(r'parser.add_argument\("(--\w+)"', CLIENT)) | {"--train_args"}
    assert set(re.findall(r"`(--\w+)`", section)) - {"--cross_site_eval"} == wanted
    assert not of_data & wanted


@pytest.mark.parametrize("name", ["model", "data"])
def test_page_names_what_the_two_files_must_define_and_the_example_defines_it(name):
    table = OWN.partition(f"| `{name}.py` | |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)(\(.*?\))?` \|", table, re.MULTILINE)
    taken = set()
    for file in (*REPO.glob("*.py"), *REPO.glob("support/**/*.py")):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        taken |= {alias.name for node in nodes if node.module == name for alias in node.names}
    assert taken == {thing for thing, _ in named}
    for file in (REPO / f"{name}.py", WINE / f"{name}.py"):
        module = load_module(file)
        for thing, signature in named:
            assert hasattr(module, thing)
            if signature:
                parameters = list(inspect.signature(getattr(module, thing)).parameters.values())
                of_page = signature[1:-1].split(", ")
                assert [re.sub(r": [^=]+| ", "", str(parameter)) for parameter in parameters[: len(of_page)]] == of_page
                assert all(parameter.default != parameter.empty for parameter in parameters[len(of_page) :])


def test_readme_shows_how_the_two_scripts_differ_and_explains_each_flare_line():
    (shown,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    assert shown == diff_of_clients()
    numbers = [int(number) for number in re.findall(r"# \((\d+)\)", CLIENT)]
    assert [int(number) for number in re.findall(r"# \((\d+)\)", shown)] == sorted(numbers)
    table = README.partition("| | what it does |")[2].partition("\n\n")[0]
    explained = [int(n) for numbers in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for n in numbers.split(",")]
    assert sorted(explained) == sorted(numbers)


def test_plain_script_trains_without_nvflare_as_client_py_does(tmp_path):
    plain = (REPO / "docs" / "plain_pytorch.py").read_text()
    assert plain.count("\n") <= 45 and "flare" not in plain
    flags = ["--dataset", "synthetic", "--train_size", "64", "--epochs", "2"]
    env = {"PYTHONPATH": str(REPO), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "docs.plain_pytorch", *flags]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    args = data_flags(train_size=64)
    loader = make_loader(load_data(args, "site-1")[0], 16, shuffle_by=(args.seed,))
    model = create_model(args.seed)
    train(model, loader, 2, 0.01, torch.device("cpu"), SummaryWriter(tmp_path), 0, "here")
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in model.state_dict().items())


def test_readme_shows_the_minimal_job_and_the_layers_as_they_are():
    recipe, layers = sorted(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    assert recipe == (REPO / "docs" / "minimal_job.py").read_text()
    assert recipe.count("\n") <= 30 and "support" not in recipe
    model = [line.strip() for line in (REPO / "model.py").read_text().splitlines()]
    assert layers.count("\n") <= 10 and set(layers.splitlines()) <= set(model)
    table = README.partition("| argument | |")[2].partition("\n\n")[0]
    explained = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE)))
    assert set(re.findall(r"(\w+)=", recipe)) == set(explained)

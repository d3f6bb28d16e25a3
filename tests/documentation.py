"""The commands of README.md and of the pages in docs/, and who runs them.

`python tests/documentation.py` prints those that .ci/run runs, each ended by a NUL.
"""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
SMALL = {  # what makes a measurement one of seconds
    "python measurements/benchmark_job.py": "rounds --dataset synthetic",
    "python -m measurements.why_federate": "--dataset synthetic --train_size 400 --rounds 1 --seeds 1 "
    "--results /dev/null --plot /dev/null",
    "python -m measurements.scale": "--sites 1 2 --parameters 62006 --results /dev/null --plot /dev/null",
}


def commands(suite: str) -> dict[str, str]:
    """Return the blocks of commands that a suite runs, each with the name of its page, in the order of the pages."""
    return {block: page.name for page in PAGES for block in blocks(page) if suite_of(page, block) == suite}


def command(page: str, words: str) -> str:
    """Return the block of commands with these words."""
    (found,) = [block for block in blocks(REPO / page) if words in block]
    return found


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def suite_of(page: Path, block: str) -> str:
    """Return who runs a block: federation, own_model or pages, which are tests, or ci."""
    if page.name == "real-sites.md":
        return "federation"
    if page.name == "own-model-and-data.md":
        return "own_model"
    if re.match(r"pip install|python -m pytest|python (-m )?measurements", block):
        return "ci"
    if re.match(r"python (job|cifar10)\.py", block) and block.count("\n") == 1:
        return "pages"
    raise ValueError(f"nobody runs this command of {page.name}: {block}")


if __name__ == "__main__":
    for block in commands("ci"):
        for line, flags in SMALL.items():
            block = block.replace(line, f"{line} {flags}")
        print(block, end="\0")

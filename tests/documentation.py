"""The commands of README.md and of the pages in docs/, and who runs them.

`python tests/documentation.py` prints those that .ci/run runs, each ended by a NUL.
"""

import difflib
import itertools
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
    text = page.read_text()
    flags = re.findall(r"^\| `(--[^`]+)` \|", section(text, "Run job"), re.MULTILINE)
    return re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) + [f"python job.py {f}\n" for f in flags]


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def suite_of(page: Path, block: str) -> str:
    """Return who runs a block: federation, own_model or pages, which are tests, or ci."""
    if page.name == "real-sites.md" or re.search(r"--env (poc|prod)", block):
        return "federation"
    if page.name == "own-model-and-data.md":
        return "own_model"
    if re.match(r"pip install|python -m pytest|python (-m )?measurements", block):
        return "ci"
    if re.match(r"python (job|cifar10)\.py", block) and block.count("\n") == 1:
        return "pages"
    raise ValueError(f"nobody runs this command of {page.name}: {block}")


def missing_lines(shown: str, printed: str) -> list[str]:
    """Return the lines that a page shows of an output and that were not printed in this order, but for [...]."""
    lines = iter(shape(printed).splitlines())
    return [line for line in shape(shown).splitlines() if line not in ("", "[...]") and line not in lines]


def shape(output: str) -> str:
    """Return an output without its numbers, the order of the sites' lines in a round, and which model is the best."""
    output = output.replace("site-", "site").replace("The best is best_", "The best is ")
    lines = [re.sub(r" +", " ", line) for line in re.sub(r"\d[\d.,:-]*", "0", output).splitlines()]
    groups = itertools.groupby(lines, key=lambda line: line.startswith("site0 round"))
    return "\n".join(line for of_sites, group in groups for line in (sorted(group) if of_sites else group))


def diff_of_clients() -> str:
    """Return how client.py differs from docs/plain_pytorch.py in its imports, and its main whole."""
    imports, main = (
        diff(plain, federated)
        for plain, federated in zip(imports_and_main("docs/plain_pytorch.py"), imports_and_main("client.py"))
    )
    return "\n".join([*(line for line in imports if line[0] != " "), " ...", *main, ""])


def diff(old: list[str], new: list[str]) -> list[str]:
    """Return a diff of lines of code in which indentation and comments make no difference."""
    code = [[re.sub(r"  # .*", "", line.strip()) for line in lines] for lines in (old, new)]
    shown = []
    for same, i, j, k, m in difflib.SequenceMatcher(None, *code, autojunk=False).get_opcodes():
        if same == "equal":
            shown += [f" {line}" for line in new[k:m]]
        else:
            shown += [f"-{line}" for line in old[i:j]] + [f"+{line}" for line in new[k:m]]
    return shown


def imports_and_main(script: str) -> list[list[str]]:
    text = (REPO / script).read_text().partition('"""\n\n')[2]
    imports, _, rest = text.partition("\ndef parse_args")
    main = "def main():\n" + rest.partition("\ndef main():\n")[2].partition("\nif __name__")[0]
    return [[line for line in part.splitlines() if line] for part in (imports, main)]


if __name__ == "__main__":
    for block in commands("ci"):
        for line, flags in SMALL.items():
            block = block.replace(line, f"{line} {flags}")
        print(block, end="\0")

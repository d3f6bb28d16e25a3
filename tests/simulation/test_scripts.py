"""However a client script ends, and when: real runs, which end soon and say why, or wait for what it still does."""

import re
import time

import pytest

from conftest import REPO, changed_client, copy_repo, insert, replace, run_job, running, succeed
from stages import ENDLESS, EVALUATION, MODEL, SMALL, cross_site_results, progress, scalars

# Where a script fails: the line of the script in front of which it does, and how far that line is indented.
STAGES = {
    "before init": ("    flare.init()  # (3)", 4),
    "before the first receive": ("        while flare.is_running():", 8),
    "in training": ("            train_loss = train(", 12),
    "between rounds": ("    finally:", 12),  # the loop's last statement
    "after the last round": ("    finally:", 8),
    "while evaluating": ("                flare.send(flare.FLModel(metrics=metrics))", 16),
}
KILL = "os.kill(os.getpid(), signal.{})"
RAISE = "raise ValueError('no such thing')"
CHILD = "import multiprocessing; multiprocessing.Process(target=time.sleep, args=(3_000,)).start()"
MISSING = "import no_such_package"
IS_MISSING = r"ModuleNotFoundError: No module named 'no_such_package' \(changed_client\.py:{line}\)"
RAISED = r"ValueError: no such thing \(changed_client\.py:{line}\)"
NO_INPUT = r"EOFError: EOF when reading a line \(changed_client\.py:{line}\)"
WAS_KILLED = "its script was killed, or ended itself, or took longer than its 60 s after the last round"
ALL_FLAGS = r"--sites site-1 site-2 --epochs=100000 --batch_size=16 --lr=0\.01 --seed=0 .*"
UNKNOWN_FLAGS = rf"its script ended with status 2: changed_client\.py: error: unrecognized arguments: {ALL_FLAGS}"
ENDS = [  # when, where, what the script does, and the reason that the last line gives
    ("before init", "site-2", MISSING, IS_MISSING),
    ("before init", "site-", "argparse.ArgumentParser().parse_args()", UNKNOWN_FLAGS),  # on all sites
    ("before init", "site-2", KILL.format("SIGKILL"), "its script was killed by SIGKILL"),
    ("before the first receive", "site-2", 'input("Go on? ")', NO_INPUT),
    ("before the first receive", "site-2", KILL.format("SIGSEGV"), "its script was killed by SIGSEGV"),
    ("in training", "site-2", KILL.format("SIGTERM"), "its script was killed by SIGTERM"),
    ("in training", "site-2", "os._exit(0)", "its script ended itself with status 0"),
    ("in training", "site-2", f"{CHILD}; {RAISE}", RAISED),  # which Python waits for
    ("in training", "site-2", "sys.exit(3)", "its script ended with status 3: goes on without a cache"),
    ("in training", "site-2", "break", "its script ended while the job went on"),
    ("in training", "site-2", "continue", r"its script ended with status 1: it received a task 10 times .* missing\?"),
    ("between rounds", "site-2", KILL.format("SIGKILL"), "its script was killed by SIGKILL"),
    ("while evaluating", "site-2", "sys.exit('too slow')", "its script ended with status 1: too slow"),
    ("after the last round", "site-2", RAISE, RAISED),
    ("after the last round", "site-2", KILL.format("SIGKILL"), WAS_KILLED),
]
CAUGHT = """    import traceback
    try:  # what is caught and printed is no reason for an end
        open("/no/such/cache")
    except OSError:
        traceback.print_exc()
    print("goes on without a cache")
"""


def write_script(folder, stage, where, how):
    """Write a client script that ends in some way where its folder has this in its path.

    Returns:
        Its path, the number of the line in which it ends, and the file that it writes just before.
    """
    before, indent = STAGES[stage]
    name = "client_with_eval.py" if stage == "while evaluating" else "client.py"
    (place,) = [line for line in (REPO / name).read_text().splitlines() if line.startswith(before)]
    end = [
        "import os, signal, sys",
        f"if '/{where}' in os.getcwd():",
        f"    open({str(folder / 'moment')!r}, 'w').close()",
        f"    {how}",
    ]
    script = changed_client(folder, name, place, "\n".join(" " * indent + text for text in end))
    first = "    args = parse_args()\n"
    replace(script, first, CAUGHT + first)
    line = 1 + script.read_text().splitlines().index(" " * (indent + 4) + how)
    return script, line, folder / "moment"


@pytest.mark.parametrize("stage, where, how, reason", ENDS)
def test_run_whose_script_ends_early_ends_soon_and_says_why(tmp_path, stage, where, how, reason):
    script, line, moment = write_script(tmp_path, stage, where, how)
    if stage in ("before init", "before the first receive", "in training"):
        flags = ENDLESS  # on the other site
    else:
        flags = [*SMALL, "--num_rounds", "2" if stage == "between rounds" else "1"]
    run = run_job(tmp_path / "workspace", *flags, "--train_script", str(script))
    assert time.time() - moment.stat().st_mtime < 50  # NVFlare's own shutdown takes a minute
    assert run.status == 1
    complete = "; the results are complete" if stage == "after the last round" else ""
    site = "site-[12]" if where == "site-" else where
    failed = rf"{site} failed: {reason.format(line=line)} \(see {run.folder}/{site}/log\.txt\)"
    assert re.fullmatch(rf"job\.py: error: {failed}(; {failed})?{complete}\n", run.errors)
    assert running(tmp_path) == []
    assert (run.folder / MODEL).exists() == (stage in ("between rounds", "while evaluating", "after the last round"))
    assert re.findall("Done: .*", run.output) == (["Done: 1 round on 2 sites."] if complete else [])
    assert (run.folder / "summary.json").exists() == bool(complete)


def test_script_that_holds_still_beyond_nvflares_half_minute_polls_and_works_on_after_its_loop_is_waited_for(tmp_path):
    hold = 'import ctypes; site_name == "site-2" and ctypes.PyDLL(None).sleep(45)'  # holds the interpreter, all threads
    after = f"""
        import atexit
        table = open("{tmp_path}/" + site_name, "w")
        table.write("a row")  # and nobody closes it
        atexit.register(print, site_name, "says goodbye")
        time.sleep(8)
        print(site_name, "has drawn its curves")"""
    script = changed_client(tmp_path, "client.py", "    finally:", after)
    replace(script, "            train_loss = train(", f"{' ' * 12}{hold}\n            train_loss = train(")
    poll = "assert not any(flare.receive(timeout=0.01) for _ in range(12))"  # there is no second task
    insert(script, "            flare.send(local_model)  # (11) to the server\n", f"{' ' * 12}{poll}\n")
    run = succeed(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    shown = run.output.partition("\nDone: ")[0].splitlines()
    for site in ("site-1", "site-2"):
        assert shown.count(f"{site} has drawn its curves") == shown.count(f"{site} says goodbye") == 1
        assert (tmp_path / site).read_text() == "a row"


def test_packages_beside_a_script_or_the_model_travel_with_all_that_is_in_them(tmp_path):
    repo = copy_repo(tmp_path / "repo")
    (tmp_path / "scripts").mkdir()
    for folder, text in ((repo / "nets", "a b"), (tmp_path / "scripts" / "tools", "a b c")):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "words.txt").write_text(text)
        (folder / "__init__.py").write_text(f"from {folder.name}.deep import count")
        file = "Path(__file__).with_name('words.txt')"
        (folder / "deep" / "__init__.py").write_text(
            f"from pathlib import Path\ncount = len({file}.read_text().split())"
        )
    replace(repo / "model.py", "import torch\n", "import nets  # for job.py, the server and the sites\nimport torch\n")
    new = "import nets\nimport tools\nprint(nets.count, 'and', tools.count, 'words')\n\n"
    script = changed_client(tmp_path / "scripts", "client.py", "def parse_args()", new)
    run = run_job(tmp_path / "workspace", *SMALL, "--train_script", str(script), repo=repo)
    assert (run.status, run.errors) == (0, "")
    assert run.output.splitlines().count("2 and 3 words") == 2


PRINTED = [
    "Größe \U0001f600 工作区",
    "  indented,\tand between \x1b[32mgreen\x1b[0m words",
    "2026-11-25 09:29:36,687 - INFO - like a record",
    "ERROR Rounds: like a record of ours",
    "launching external trainer, it says",
    "--- Logging error ---",
    "Traceback (most recent call last):",
    '  File "mine.py", line 1, in <module>',
    "long " * 4000 + "line",
    "the last one",
]


def test_script_elsewhere_that_prints_and_reports_what_is_odd_gets_its_summary(tmp_path):
    line = "                flare.send(flare.FLModel(metrics=metrics))"
    text = "\n\n".join(PRINTED)
    odd = f"""                if site_name == "site-2":
                    print({text!r})
                metrics = {{"accuracy": "high", "loss": None, "note": [1, 2], "mean": 1.5}}"""
    script = changed_client(tmp_path, "client_with_eval.py", line, odd)
    flags = ["--train_size", "64", "--test_size", "100", "--split", "iid", "--train_script", str(script)]
    run = succeed(tmp_path / "workspace", *flags)
    lines = progress(run.output)
    models = cross_site_results(run)["site-2"]
    # All of it but the empty lines, which NVFlare drops.
    assert lines[lines.index(EVALUATION) + 1 :] == PRINTED * len(models)
    warning = "WARNING: no site reported accuracy as a finite number, and so no model is called the best."
    assert f"\n{warning}\n" in run.output
    assert f"\n  tensorboard --logdir {run.results / 'tb_events'}\n" in run.output
    assert scalars(run, "site-1")["mean"] == {2: 1.5}

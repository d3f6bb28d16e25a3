"""What is kept from harm, as far as it can be seen without a run."""

import argparse
import os
from pathlib import Path

import pytest
import torch

from support.arguments import workspace_folder
from support.failure import JobFailed
from support.results import read_results


class Hostile:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_model_that_comes_back_is_not_run(tmp_path):
    model, ran = tmp_path / "app_server" / "FL_global_model.pt", tmp_path / "ran"
    model.parent.mkdir()
    torch.save({"model": Hostile(ran)}, model)
    with pytest.raises(JobFailed, match="holds more than weights, and was not loaded"):
        read_results(argparse.Namespace(num_rounds=1), str(tmp_path), ("accuracy", "max"))
    assert not ran.exists()
    torch.load(model, weights_only=False)
    assert ran.exists()  # so it would have been run


def test_workspace_of_another_user_is_refused(workspace):
    workspace.mkdir(mode=0o755)
    owner, other = os.getuid(), 65534
    if owner != 0:
        pytest.skip("only root can become another user")
    for user, refused in ((owner, False), (other, True)):
        child = os.fork()
        if child == 0:
            os.setuid(user)
            try:
                workspace_folder(str(workspace))
                os._exit(0)
            except ValueError:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (2 if refused else 0)

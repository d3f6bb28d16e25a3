"""client.py that says when it takes its first step; with OWN_COPY in the environment, it reads the images itself."""

import os
import runpy
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

import cifar10
import data

if "OWN_COPY" in os.environ:
    data.load_cifar10 = lambda root: [
        cifar10.Images(*part, cifar10.CLASSES) for part in cifar10.download_and_decode(root).values()
    ]


def say_first_step(*_):
    global hook
    if hook:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        print(f"first step {time.clock_gettime(time.CLOCK_BOOTTIME) - started:.2f} s after the process's start")
        hook = hook.remove()


hook = register_optimizer_step_post_hook(say_first_step)
runpy.run_path(os.environ["CLIENT"], run_name="__main__")

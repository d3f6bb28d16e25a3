"""client.py whose site-1 keeps each global model for the measurement."""

import os
import runpy
from pathlib import Path

import nvflare.client as flare
import torch

receive = flare.receive


def receive_and_keep():
    global_model = receive()
    if flare.get_site_name() == "site-1":
        torch.save(global_model.params, Path(os.environ["MODELS"], f"{global_model.current_round}.pt"))
    return global_model


flare.receive = receive_and_keep
runpy.run_path(os.environ["CLIENT"], run_name="__main__")

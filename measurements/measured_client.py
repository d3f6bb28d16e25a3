"""client.py whose site-1 keeps each global model for the measurement; with FEDPROX_MU set, sites train with FedProx."""

import os
import runpy
from pathlib import Path

import nvflare.client as flare
import torch

MU = float(os.environ.get("FEDPROX_MU", 0))
receive = flare.receive


class ProximalSGD(torch.optim.SGD):
    """SGD on the loss plus mu/2 |w - w_global|^2 (Li et al. 2020, arXiv:1812.06127).

    client.py makes a round's optimizer when the model has the weights of the global model: these are w_global.
    """

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.received = [weight.detach().clone() for weight in self.param_groups[0]["params"]]

    def step(self):
        for weight, received in zip(self.param_groups[0]["params"], self.received):
            weight.grad.add_(weight.detach() - received, alpha=MU)
        super().step()


def receive_and_keep():
    global_model = receive()
    if flare.get_site_name() == "site-1":
        torch.save(global_model.params, Path(os.environ["MODELS"], f"{global_model.current_round}.pt"))
    return global_model


flare.receive = receive_and_keep
if MU:
    torch.optim.SGD = ProximalSGD
runpy.run_path(os.environ["CLIENT"], run_name="__main__")

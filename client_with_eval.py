"""client.py plus evaluation: FLARE lines 13 to 16 answer the server's other tasks."""

import argparse
import time
from pathlib import Path

import nvflare.client as flare  # (1) the Client API
import torch
from nvflare.client.tracking import SummaryWriter  # (2) in place of torch.utils.tensorboard's

from data import add_data_flags, load_data, make_loader
from model import compute_metrics, create_model, criterion

LOCAL_MODEL = Path("local_model.pt")  # in the site's own folder, for a later task, which may come to a new process


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the model on one site; job.py sets the flags.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sites", nargs="+", default=["site-1", "site-2"])  # all of them, for --split
    add_data_flags(parser)
    return parser.parse_args()


def train(model, train_loader, epochs, lr, device, writer, first_step, place):
    """Train for some epochs, print a line per epoch that begins with `place`, and return the mean loss, a float.

    The writer takes `train_loss`, a mean over the latest steps, about ten times per epoch. Steps count from first_step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    log_interval = max(1, len(train_loader) // 10)
    losses = []
    model.train()
    for epoch in range(1, epochs + 1):
        start = time.monotonic()
        for inputs, labels in train_loader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())  # no .item() here: it would wait for the GPU
            if len(losses) % log_interval == 0:
                recent = torch.stack(losses[-log_interval:]).mean().item()
                writer.add_scalar("train_loss", recent, global_step=first_step + len(losses))
        epoch_loss = torch.stack(losses[-len(train_loader) :]).mean().item()
        print(f"{place}  epoch {epoch}/{epochs}  loss {epoch_loss:.4f}  {time.monotonic() - start:.1f} s")
    return torch.stack(losses).mean().item()


@torch.no_grad()
def evaluate(model, test_loader, device):
    """Return the metrics of a model over all test samples, by name."""
    model.eval()
    batches = [(model(inputs.to(device)).cpu(), labels) for inputs, labels in test_loader]
    outputs, labels = (torch.cat(parts) for parts in zip(*batches))
    return compute_metrics(outputs, labels)


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model().to(device)

    flare.init()  # (3) connect this process to its site's NVFlare client
    try:
        site_name = flare.get_site_name()  # (4) such as site-1
        train_set, test_set = load_data(args, site_name)
        test_loader = make_loader(test_set, batch_size=1000)
        writer = SummaryWriter()  # (5) its points go to the server
        while flare.is_running():  # (6) wait for the next task; False when the job has ended
            global_model = flare.receive()  # (7) what came with it, such as the global model
            if flare.is_submit_model():  # (13) the server wants this site's latest local model
                params = torch.load(LOCAL_MODEL) if LOCAL_MODEL.exists() else {}  # {}: this site was never drawn
                flare.send(flare.FLModel(params=params))  # (14)
                continue
            model.load_state_dict(global_model.params)  # (8) start from its weights
            metrics = evaluate(model, test_loader, device)
            if flare.is_evaluate():  # (15) the server wants the metrics of this model and nothing else
                flare.send(flare.FLModel(metrics=metrics))  # (16)
                continue
            current_round, end = global_model.current_round, global_model.start_round + global_model.total_rounds  # (9)
            for name, value in metrics.items():
                if value is not None:  # a metric of your own may be None on some sites
                    writer.add_scalar(name, value, global_step=current_round)
            train_loader = make_loader(train_set, args.batch_size, shuffle_by=(args.seed, site_name, current_round))
            steps = args.epochs * len(train_loader)  # a batch is a step
            place = f"{site_name}  round {current_round + 1}/{end}"  # rounds count from 0
            train_loss = train(model, train_loader, args.epochs, args.lr, device, writer, current_round * steps, place)
            torch.save(model.state_dict(), LOCAL_MODEL)
            local_model = flare.FLModel(  # (10) the local model
                params=model.state_dict(),
                metrics={"train_loss": train_loss, **metrics},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},  # this site's weight in the mean
            )
            flare.send(local_model)  # (11) to the server
    finally:
        flare.shutdown()  # (12) after an error too: FLARE's threads would keep a failed process alive


if __name__ == "__main__":
    main()

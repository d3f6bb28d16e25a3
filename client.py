"""One site's local training: plain PyTorch, made federated by the five numbered FLARE lines."""

import argparse
import zlib

import nvflare.client as flare  # (1) the Client API
import torch
from nvflare.client.tracking import SummaryWriter
from torch.nn import functional as F

from data import DATA_ROOT, SPLITS, load_data, make_loader, take_shard
from model import SimpleNetwork


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train SimpleNetwork on one site; job.py sets the flags.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--dataset", choices=["cifar10", "synthetic"], default="cifar10")
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--train_size", type=int)
    parser.add_argument("--test_size", type=int)
    parser.add_argument("--split", choices=SPLITS, default="same")
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--shard", type=int, default=1)
    parser.add_argument("--num_shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(model, train_loader, epochs, lr, device, writer, first_step):
    """Train for some epochs with SGD and log the training loss about ten times an epoch.

    Args:
        train_loader: batches of images float32 (B, 3, 32, 32) and labels int64 (B,).
        writer: takes `train_loss`, the mean cross-entropy since the last point, at the optimizer step.
        first_step: how many optimizer steps came before.

    Returns:
        The mean training loss, a float.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    log_interval = max(1, len(train_loader) // 10)
    losses = []
    model.train()
    for _ in range(epochs):
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) % log_interval == 0:
                recent = torch.stack(losses[-log_interval:]).mean().item()
                writer.add_scalar("train_loss", recent, global_step=first_step + len(losses))
    return torch.stack(losses).mean().item()


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SimpleNetwork().to(device)

    flare.init()  # (2) join the federation
    try:
        train_set, _ = load_data(args.dataset, args.data_root, args.train_size, args.test_size, args.seed)
        train_set = take_shard(train_set, args.split, args.alpha, args.shard, args.num_shards, args.seed)
        writer = SummaryWriter()  # TensorBoard's interface; FLARE carries the points to the server
        site_name = flare.get_site_name()

        while flare.is_running():
            global_model = flare.receive()  # (3) receive the global model
            model.load_state_dict(global_model.params)  # (4) start from its weights

            # Each site and round has an order of its own, the same when a run is repeated.
            current_round = global_model.current_round
            shuffle_seed = zlib.crc32(f"{args.seed} {site_name} {current_round}".encode())
            train_loader = make_loader(train_set, args.batch_size, torch.Generator().manual_seed(shuffle_seed))
            steps = args.epochs * len(train_loader)
            train_loss = train(model, train_loader, args.epochs, args.lr, device, writer, current_round * steps)
            print(f"{site_name}, round {current_round}: mean training loss {train_loss:.4f}")

            local_model = flare.FLModel(
                params=model.state_dict(),
                metrics={"train_loss": train_loss},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},  # FedAvg's weight of this site
            )
            flare.send(local_model)  # (5) send the new weights
    finally:
        flare.shutdown()  # after an error too: FLARE's threads would keep a failed process alive


if __name__ == "__main__":
    main()

"""Training on one machine, before it was federated: python -m docs.plain_pytorch --dataset synthetic"""

import argparse

import torch
from torch.utils.tensorboard import SummaryWriter

from data import add_data_flags, load_data, make_loader
from model import create_model, criterion


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    add_data_flags(parser)
    return parser.parse_args()


def train(model, train_loader, epochs, lr, device, writer):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for epoch in range(1, epochs + 1):
        for inputs, labels in train_loader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
        writer.add_scalar("train_loss", loss.item(), global_step=epoch)


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model(args.seed).to(device)
    train_set, _ = load_data(args, "site-1")
    writer = SummaryWriter()
    train_loader = make_loader(train_set, batch_size=16, shuffle_by=(args.seed,))
    train(model, train_loader, args.epochs, 0.01, device, writer)
    torch.save(model.state_dict(), "model.pt")


if __name__ == "__main__":
    main()

"""The networks in pretrained/ for torch.hub (docs/tickets.md)."""

from pathlib import Path

from tools.tickets import load

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]


def ticket(file="TD_ticket.npz"):
    """A network of pretrained/: uint8 [n,32,32,3], RGB, to logits [n,10] of its class_names."""
    return load(Path(__file__).parent / "pretrained" / file)[1]

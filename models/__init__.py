"""Backbones. Another one is a class in a file here and a row in BACKBONES (docs/extending.md)."""

from models.resnet import ResNet18, ResNet32

BACKBONES = {network.arch: network for network in (ResNet18, ResNet32)}


def build_model(args):
    """The network of --arch and --precision with heads for the tasks of the run.

    A --width that was not given becomes the backbone's own, in args too, for the records.
    """
    network = BACKBONES[args.arch]
    args.width = args.width or network.default_width
    model = network(args.classes_per_classifier, args.classifiers, args.width)
    model.bf16 = args.precision == "bf16"
    return model

"""Backbones. A second one would stand beside resnet.py and offer the same methods."""

from models.resnet import ResNet

__all__ = ["ResNet"]

"""Plain `nn.Module`s of the papers, Xavier-initialised, every activation a module of its own."""

from apical.models.catalogue import build, names
from apical.models.initialisation import xavier_
from apical.models.lenet import LeNet, LeNetCIFAR
from apical.models.mlp import mlp
from apical.models.resnet import BasicBlock, CifarResNet, ResNet, ZeroPadShortcut

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "LeNet",
    "LeNetCIFAR",
    "ResNet",
    "ZeroPadShortcut",
    "build",
    "mlp",
    "names",
    "xavier_",
]

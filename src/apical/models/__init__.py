"""Plain `nn.Module`s of the papers, Xavier-initialised, every activation a module of its own."""

from apical.models.catalogue import build, names
from apical.models.flow import flow
from apical.models.graph import Graph
from apical.models.initialisation import critical_, looks_linear_, orthogonal_, xavier_, xavier_normal_
from apical.models.lenet import LeNet, LeNetCIFAR
from apical.models.mlp import autoencoder, mlp, mlp_elu, mlp_tanh
from apical.models.mu import mlp_mu
from apical.models.resnet import BasicBlock, CifarResNet, ResNet, ZeroPadShortcut

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "Graph",
    "LeNet",
    "LeNetCIFAR",
    "ResNet",
    "ZeroPadShortcut",
    "autoencoder",
    "build",
    "critical_",
    "flow",
    "looks_linear_",
    "mlp",
    "mlp_elu",
    "mlp_mu",
    "mlp_tanh",
    "names",
    "orthogonal_",
    "xavier_",
    "xavier_normal_",
]

"""Models of the papers as plain `nn.Module`s, mostly Xavier-initialised; every activation is a separate module."""

from apical.core.spike_times import FirstSpike, Readout, SpikingLinear
from apical.models.catalogue import build, names
from apical.models.first_spike import FirstSpikeNetwork, first_spike
from apical.models.graph import Graph
from apical.models.initialisation import critical_, looks_linear_, orthogonal_, xavier_, xavier_normal_
from apical.models.lenet import LeNet, LeNetCIFAR
from apical.models.mlp import autoencoder, mlp, mlp_elu, mlp_tanh
from apical.models.mu import mlp_mu
from apical.models.orthogonal_flow import flow
from apical.models.patches import Mixer, VisionTransformer
from apical.models.recurrent import Recurrent
from apical.models.resnet import BasicBlock, CifarResNet, ResNet, ZeroPadShortcut
from apical.models.spiking import spiking
from apical.models.transformer import Transformer

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "FirstSpike",
    "FirstSpikeNetwork",
    "Graph",
    "LeNet",
    "LeNetCIFAR",
    "Mixer",
    "Readout",
    "Recurrent",
    "ResNet",
    "SpikingLinear",
    "Transformer",
    "VisionTransformer",
    "ZeroPadShortcut",
    "autoencoder",
    "build",
    "critical_",
    "first_spike",
    "flow",
    "looks_linear_",
    "mlp",
    "mlp_elu",
    "mlp_mu",
    "mlp_tanh",
    "names",
    "orthogonal_",
    "spiking",
    "xavier_",
    "xavier_normal_",
]

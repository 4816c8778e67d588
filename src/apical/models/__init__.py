"""Plain `nn.Module`s of the papers, Xavier-initialised, every activation a module of its own."""

from apical.core.spike_times import FirstSpike, Readout, SpikingLinear
from apical.models.catalogue import build, names
from apical.models.first_spike import FirstSpikeNetwork, first_spike
from apical.models.initialisation import xavier_, xavier_normal_
from apical.models.lenet import LeNet, LeNetCIFAR
from apical.models.mlp import autoencoder, mlp, mlp_elu, mlp_tanh
from apical.models.mu import mlp_mu
from apical.models.resnet import BasicBlock, CifarResNet, ResNet, ZeroPadShortcut
from apical.models.spiking import spiking

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "FirstSpike",
    "FirstSpikeNetwork",
    "LeNet",
    "LeNetCIFAR",
    "Readout",
    "ResNet",
    "SpikingLinear",
    "ZeroPadShortcut",
    "autoencoder",
    "build",
    "first_spike",
    "mlp",
    "mlp_elu",
    "mlp_mu",
    "mlp_tanh",
    "names",
    "spiking",
    "xavier_",
    "xavier_normal_",
]

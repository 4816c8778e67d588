"""Spiking networks: contrastive-signal-dependent plasticity, and neurons that fire once."""

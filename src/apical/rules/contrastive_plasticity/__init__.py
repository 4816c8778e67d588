"""Contrastive-signal-dependent plasticity: spiking layers that learn from their own traces."""

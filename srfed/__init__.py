"""srfed: train diffusion models together without pooling images (federated SR-DDPM)."""

__version__ = "0.1.0"

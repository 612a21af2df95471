"""Peer-to-peer distribution of container images, models and files, with no centre."""

__version__ = "0.1.0"

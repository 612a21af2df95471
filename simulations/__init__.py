"""The same swarm code over a simulated network and a virtual clock."""

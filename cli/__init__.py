"""The `swarm` command: parse, call, print."""

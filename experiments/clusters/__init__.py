"""Launch files for clusters, and a script that starts a command again (docs/clusters.md)."""

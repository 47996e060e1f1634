"""Hydra finds launchers in this namespace: runs of a sweep over the cores of one machine (joblib) or over a cluster (Slurm)."""

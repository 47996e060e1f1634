"""Where joblib or submitit is not installed, Hydra knows no such launcher, and says nothing of it."""

from contextlib import suppress

with suppress(ImportError):
    from hydra_plugins.papercheck._launchers import ClusterLauncher, CoresLauncher

    __all__ = ["ClusterLauncher", "CoresLauncher"]

"""Loaders of real data sets from a local folder (``data.root``) or from an installed library; nothing is ever downloaded."""

"""Spike trains: three stand-ins that need no download, and readers of the real sets."""

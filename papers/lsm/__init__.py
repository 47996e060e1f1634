"""Resistive-memory liquid state machine for zero-shot learning of multimodal event data (Nature Computational Science 5, 2025)."""

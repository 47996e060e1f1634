"""One step of a spiking layer and of its back-propagation, compiled by numba: what is left of a step beside its matrix product.

The loops in torch of :mod:`papers.lsm.baselines` are the reference.
"""
# mypy: allow-untyped-defs, disable-error-code="untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, boundscheck=False)
def step(product, last_u, last_s, decay, threshold, u, s):
    """Fill potentials and spikes (B, N) from the product of the step and the last step's state."""
    for b in range(u.shape[0]):
        for n in range(u.shape[1]):
            u[b, n] = product[b, n] + decay * last_u[b, n] * (np.float32(1.0) - last_s[b, n])
            s[b, n] = np.float32(u[b, n] > threshold)


@njit(nogil=True, cache=True, boundscheck=False)
def step_back(product, u, s, last_du, decay, threshold, width, du):
    """Fill the gradient of the potentials (B, N): ``product`` is that of the spikes through the loss and the next step's currents."""
    slope = np.float32(0.5) / width
    for b in range(u.shape[0]):
        for n in range(u.shape[1]):
            kept = decay * last_du[b, n]
            ds = product[b, n] - u[b, n] * kept
            near = slope if abs(u[b, n] - threshold) < width else np.float32(0.0)
            du[b, n] = ds * near + kept * (np.float32(1.0) - s[b, n])

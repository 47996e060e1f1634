"""EAR (arXiv 2308.02084): a frozen encoder, shallow adaptors that grow with the domains, a hyperdimensional head that routes."""

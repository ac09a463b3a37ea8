"""Triton kernels; imported only when the backend "triton" serves a call."""

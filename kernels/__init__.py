"""Triton kernels and their launchers (torch and triton only); installed as `segclip_fast.kernels`."""

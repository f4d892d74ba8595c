"""Pretrained weights: which there are (manifest), getting and loading them (load), other layouts (convert)."""

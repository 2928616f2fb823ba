"""Experiments: tables of settings that are trained, sampled and scored once, and drawings of what comes of them."""

"""Editing of a single picture (Sec. 3.4, 4.3): train on it, invert it, sample other prompts."""

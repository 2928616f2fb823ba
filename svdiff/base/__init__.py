"""The embedded base: a picture world of real artwork, a small Stable Diffusion trained on it, and its evaluators."""

"""The embedded base: a picture world of individuals, a small Stable Diffusion trained on it, and its evaluators."""

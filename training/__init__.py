"""How the demo model was made: draw a world of shapes, then train a small Stable Diffusion on it."""

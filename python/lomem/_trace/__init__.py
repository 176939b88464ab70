"""Records what a model does while it runs, and hands tensors from one module to another."""

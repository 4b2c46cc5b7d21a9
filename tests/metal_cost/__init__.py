"""What the Metal kernels cost in an Apple GPU's instructions, beside MLX's: ``python -m metal_cost``."""

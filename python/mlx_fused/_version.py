"""The check that the installed MLX is the one this build was compiled against."""

from importlib.metadata import version

from mlx_fused._build import MLX_VERSION

__version__ = version("mlx-fused")


def check_mlx(installed: str) -> None:
    """Raises ImportError unless `installed` is the MLX of this build: libmlx has no stable C++ ABI."""
    if installed != MLX_VERSION:
        raise ImportError(
            f"mlx-fused {__version__} was built for mlx {MLX_VERSION}, but mlx {installed} is installed. "
            f"Fix: pip install 'mlx=={MLX_VERSION}', or install the mlx-fused release for mlx {installed}."
        )

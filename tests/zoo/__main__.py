"""Writes docs/models.md: ``python -m zoo`` in the folder of the tests."""

import platform
from importlib.metadata import version

import mlx.core as mx
from rich.progress import track

from zoo import configs, parity, table

mx.set_default_device(mx.cpu)
results = {name: parity.measure(name) for name in track(configs.names(), "Comparing models")}
rows = {name: table.row(result) for name, result in results.items() if result}
versions = f"mlx {version('mlx')} on {platform.system()} {platform.machine()}"
table.DOCUMENT.write_text(table.page(rows, versions))

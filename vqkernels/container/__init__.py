"""Containers: quantised matrices in safetensors files that describe and check themselves.

`save` writes one file, `save_shards` several with an index, and `join` makes either of files that
hold the matrices already; `open_container` maps either and reads a matrix when it is asked for,
`load` reads matrices into a dict, `describe` gives what headers say. `manifest` says what a header
holds, `stored` what lies behind it, `index` what an index does.
"""

from vqkernels.container.access import describe, load, open_container
from vqkernels.container.base import Container
from vqkernels.container.manifest import CONTAINER_VERSION, ContainerInfo, TensorInfo
from vqkernels.container.shards import save_shards
from vqkernels.container.write import save

__all__ = [
    "CONTAINER_VERSION",
    "Container",
    "ContainerInfo",
    "TensorInfo",
    "describe",
    "load",
    "open_container",
    "save",
    "save_shards",
]

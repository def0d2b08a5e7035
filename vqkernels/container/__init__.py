"""Containers: quantised matrices in a safetensors file that describes and checks itself.

`save` writes one, `open_container` maps one and reads a matrix when it is asked for, `load` reads
matrices into a dict, `describe` gives what the header says. `manifest` says what the header
holds, `stored` what lies behind it.
"""

from vqkernels.container.manifest import CONTAINER_VERSION, ContainerInfo, TensorInfo
from vqkernels.container.read import Container, describe, load, open_container
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
]

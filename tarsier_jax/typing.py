"""The array types of annotations."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from jax import Array as Array

    HostOrDeviceArray = Any
else:
    # Functions of JAX accept NumPy arrays too. A static checker would ask for a distinction at each use of `.at`.
    Array = jax.Array | np.ndarray
    HostOrDeviceArray = Array  # NumPy on the host, jax.Array on a device and under jit

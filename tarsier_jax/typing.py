"""The array type of annotations."""

from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    from jax import Array as Array
else:
    # Functions of JAX accept NumPy arrays too. A static checker would ask for a distinction at each use of `.at`.
    Array = jax.Array | np.ndarray

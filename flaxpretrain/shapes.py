"""The legend of dimension letters, and array aliases that need numpy only.

| letter | dimension                              |
|--------|----------------------------------------|
| B      | batch: rows                            |
| L      | length of a row, in tokens             |
| S      | source length                          |
| T      | target length, or tokens in a stream   |
| D      | width (hidden size)                    |
| H      | attention heads                        |
| K      | size of a head                         |
| F      | feed-forward width                     |
| V      | vocabulary, padded                     |
| N      | layers                                 |
| M      | masked (gathered) positions of a row   |
| G      | pieces (segments) that share a row     |
| A      | microbatches                           |

Shapes stand in signatures as jaxtyping annotations, `Float[Array, "B L D"]`, and the tests check
them at run time. Code that must not import jax uses the numpy aliases below.

Reference: the shape-suffix convention, https://medium.com/@NoamShazeer (cited by torchtitan).
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt

Numpy = np.ndarray
"""Any numpy array; always used inside a jaxtyping shape."""

IdsBL = Int[Numpy, "B L"]
"""Token ids of B rows."""

Batch = Mapping[str, Shaped[Numpy, "B ..."]]
"""Arrays of fixed shape whose leading axis is B."""

__all__ = ["Batch", "Bool", "Float", "IdsBL", "Int", "Numpy", "Shaped", "UInt"]

"""All tolerances of the tests, with their reasons. Never relax one in place: explain it here."""

LOGITS_FLOAT32 = 2e-5
"""Largest absolute difference of logits from PyTorch Transformers', float32 on the CPU."""

FLOAT32_REORDERED = 2e-6
"""Parameters near 1 after two steps, when float32 sums were taken in another order."""

OPTIMIZER_FLOAT32 = 1e-4
"""Way of a parameter over 4 float32 updates against float64's, relative to its longest: the way is
some thousandths of the parameter, whose rounding is 1e-7 of itself."""

ORTHOGONALISED_FLOAT32 = 1e-3
"""As before, for Muon: five Newton-Schulz iterations amplify rounding."""

LOSS_REORDERED = 1e-5
"""Relative difference of float32 losses over a few steps on another mesh or process count."""

EVALUATION_ANYWHERE = 1e-6
"""Relative difference of an evaluation's figures at another batch size or on other devices."""

REMAT_FLOAT32 = 2e-6
"""Values and gradients near 1 of a network recomputed, unrolled or looped, in float32."""

FLASH_FLOAT32 = 2e-5
"""Outputs and gradients near 1 of a flash kernel against plain softmax attention, in float32."""

PIECES_FLOAT32 = 5e-6
"""Hidden states near 1 of a piece alone against the same piece in a packed row, in float32."""

FLOPS_COUNTED = 0.04
"""Relative difference of a FLOP formula from the products in XLA's program of an unrolled network:
the first layer's unneeded input gradient is not computed, sums over rows are products, and jax 0.10
keeps the scores that later releases compute twice."""

COLLECTIVE_BYTES = 1.001
"""Bytes that a data-parallel step reduces over those of its gradient: the loss sums come along."""

GRADIENTS_FLOAT32 = 5e-6
"""Largest absolute difference of gradients up to about 1 from PyTorch's, float32 on the CPU."""

REMEMBERED_FLOAT32 = 1e-5
"""Hidden states near 1 of tokens decoded one by one against the row at once, in float32."""

FLOAT16_STEP = 0.01
"""Relative difference of the loss and the gradient's norm of a float16 step from float32's, whose
numbers have 11 bits."""

BFLOAT16_SUMS = 0.005
"""Relative difference of a gradient's norm when it is summed in bfloat16, whose numbers have 8
bits: their errors are of either sign."""

EIGHT_BITS = {"int8": 0.012, "int8_forward": 0.012, "fp8": 0.07, "fp8_forward": 0.045}
"""Length of the error of a product of random numbers in 8 bits, and of its gradients, over the
product's own length: int8 has 127 steps up to a row's largest number, some four deviations; e4m3
four significant bits, e5m2, of gradients, three."""

EIGHT_BITS_NETWORK = {"int8": 0.06, "int8_forward": 0.06, "fp8": 0.2, "fp8_forward": 0.15}
"""The same of all gradients of a network of two layers, whose products feed on each other."""

EIGHT_BITS_TRAINED = 0.1
"""Relative difference of any of 100 losses on one batch from that of float32 products, while it
falls from 5.7 to 0.12, where the last tenths of the way are rounding's."""

EIGHT_BITS_ELSEWHERE = 1e-3
"""Relative difference of the loss and the gradient's norm in 8 bits on another mesh: a sum in
another order may fall to the other side of a step of int8."""

"""Exact search through tiles of similarities: what `matching` and `mutual` run on where the machine has it.

Legend: ``Q`` query patches, ``M`` reference rows, ``D`` features, ``T`` tiles of 16 reference rows.

1. Similarities are computed in the fast precision, and only those that reach a limit are kept (``lowest``; of several
   nearest rows, and of images, the highest of each tile: ``tiles``): no [Q, M] matrix exists.
2. Rounding moves a similarity by at most the sum of the two rows' rounding residuals (Cauchy-Schwarz), so what is
   further below the n-th highest than that cannot be one of the n highest.
3. The rest is compared again in float32. What is reported comes from there.
"""

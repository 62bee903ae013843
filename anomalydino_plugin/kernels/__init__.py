"""Exact search through tiles of similarities: what `matching` and `mutual` run on where the machine has it.

Legend: ``Q`` query patches, ``M`` reference rows, ``D`` features, ``T`` tiles of 16 reference rows.

1. Similarities are computed in the fast precision and only the highest of each tile is kept: no [Q, M] matrix exists.
2. Rounding moves a similarity by at most the sum of the two rows' rounding residuals (Cauchy-Schwarz), so a tile whose
   maximum is further below the n-th highest cannot hold one of the n highest rows.
3. The rows of all other tiles are compared again in float32. What is reported comes from there.
"""

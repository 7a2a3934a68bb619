"""The mathematics: tensors in, tensors out.

Vocabulary, used by every module of this room (`i`, `j` index input features, `o` output features, `t` tokens):

* delta `D` [out, in]: tuned minus base weight of one layer `y = W x`.
* moment [in, in]: the sum of `x x^T` over the tokens of the safety data. Hessian `H = (2/N) * moment` for N sequences.
* curvature: `H` after damping, with its factor `R`, upper triangular, `H = R R^T`. With `K = H^-1` and `U` the upper
  Cholesky factor of `K` (`K = U^T U`), `U = R^-1`; so the pivot `R_mm^2 = 1 / U_mm^2` is the cost of a unit of energy
  kept in column m.
* transform `T`: a map of rows, `D* = D T`. Every rule ends as one, but for the merges.
* quadratic safety loss `q(D) = 1/2 tr(D H D^T)`.
"""

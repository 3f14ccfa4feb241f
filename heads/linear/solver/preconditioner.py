"""Preconditioner of a logistic head: coordinates in which its Hessian is near the identity.

C classes, R + 1 coordinates (the intercept last), n sampled rows, c = C - 1 free class directions
(1 for a sigmoid), J dense coordinates.

The Hessian of a softmax head is sum_i w_i S_i (x) z_i z_i', S_i = diag(p_i) - p_i p_i', plus the
penalty. The rows z are in the eigenbasis of their Gram matrix already. Classes are rotated likewise
into eigenvectors E of sum_i w_i S_i, whose null direction (all classes alike) is dropped. In the
product of both bases the exact diagonal of the Hessian,
    h[c, j] = sum_i w_i (e_c' S_i e_c) z_ij^2 + l2,
costs one thin product over a sample of rows, and its root is the scale of the coordinate. This is
Kronecker-factored curvature with a corrected diagonal (George et al., NeurIPS 2018), here computed
instead of learned. Conjugate gradients need 12 iterations instead of the 16 with Boehning's fixed
bound 1/2 (I - 11'/C) at strong regularization, and 25 instead of 53 at scikit-learn's C = 1 (5,000
rows, 512 features, 10 classes, relative error 1e-4).

What the diagonal misses is strongest among the few largest coordinates of the rows, between all
classes. For these, with the intercept, the whole Hessian of the sample is computed, and its
Cholesky factor takes the place of the scales.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from headrace.heads.arrays import Array, Index
from headrace.heads.linear.solver.loss import sigmoid, softmax

# Curvature that is added to the intercept's, as a share of the rows' total weight; the L2 strength
# if that is less.
INTERCEPT_FLOOR = 1e-4
# Rows that the Hessian is computed from: at least so many, and so many for each class.
SAMPLED_ROWS, SAMPLED_ROWS_PER_CLASS = 2048, 20
# Coordinates that are taken together, counted over all free class directions; more where classes
# are many. Without any, a bank of ten classes takes 1.24 (5,000 x 512) to 1.33 (10,000 x 1,280) of
# the CPU time. 160 save as much as 480; blocks within each class alone save a tenth of it.
DENSE_COORDINATES, MAX_DENSE_COORDINATES = 160, 1024
# Beyond, the products of all pairs of classes cost more than the iterations that they save: with
# them, 200 classes take 305 iterations instead of 344, but 1.17 of the CPU time.
MAX_CLASSES_FOR_DENSE = 128
# Beyond, the eigenvectors of the classes cost too much: at 1,200 classes (6,000 x 128) 1.71 of the
# CPU time.
MAX_CLASSES_FOR_EIGENVECTORS = 1024


@dataclass(frozen=True)
class Preconditioner:
    """Scaled coordinates x (c, R + 1) of the weights u (C, R + 1) of a head.

    With v = E' u, the `dense` coordinates of v, taken together, become L' v; every other one is
    multiplied by its own scale.
    """

    class_basis: Array  # E (C, c), orthonormal columns
    scale: Array  # (c, R + 1)
    dense: Index  # (J,)
    cholesky_factor: Array  # L (c J, c J), lower triangular, in Fortran's order
    inverse_factor: Array  # of L, likewise
    loss_curvature: float  # of the loss, summed over all coordinates but the intercept's

    def to_scaled(self, u: Array) -> Array:
        """Return x of u (..., C, R + 1)."""
        v = self.class_basis.T @ u
        return self._rescale(v, np.multiply, self.cholesky_factor, out=v)

    def from_scaled(self, x: Array) -> Array:
        """Return u of x (..., c, R + 1)."""
        return np.asarray(self.class_basis @ self._rescale(x, np.divide, self.inverse_factor))

    def free_from_scaled(self, x: Array) -> Array:
        """Return the free weight vectors (..., c, R + 1) of u.

        Of a softmax all but the last, which is minus their sum; of a sigmoid its only one.
        """
        n_free = self.class_basis.shape[1]
        v = self._rescale(x, np.divide, self.inverse_factor)
        return np.asarray(self.class_basis[:n_free] @ v)

    def from_class_basis_of(self, other: "Preconditioner", x: Array) -> Array:
        """Return x (..., c, R + 1) of another preconditioner along this one's class directions.

        The scales stay those of the other one.
        """
        return np.asarray((self.class_basis.T @ other.class_basis) @ x)

    def gradient_to_scaled(self, gradient: Array) -> Array:
        """Return gradients with respect to x, of gradients with respect to u (..., C, R + 1).

        (..., C - 1, R + 1) are taken for gradients whose last row is minus the sum of the others.
        """
        basis = self.class_basis
        if gradient.shape[-2] < len(basis):
            basis = basis[:-1] - basis[-1]
        v = basis.T @ gradient
        return self._rescale(v, np.divide, self.inverse_factor, transposed=True, out=v)

    def gradient_from_scaled(self, gradient: Array) -> Array:
        """Return gradients with respect to u (..., C, R + 1): inverse of `gradient_to_scaled`."""
        v = self._rescale(gradient, np.multiply, self.cholesky_factor, transposed=True)
        return np.asarray(self.class_basis @ v)

    def _rescale(
        self,
        v: Array,
        multiply_or_divide: np.ufunc,
        matrix: Array,
        *,
        transposed: bool = False,
        out: Array | None = None,
    ) -> Array:
        """Return v times or over the scales, its dense coordinates times the matrix instead.

        `out` may be v. transposed: multiply by the matrix's transpose.
        """
        if len(self.dense) == 0:
            return np.asarray(multiply_or_divide(v, self.scale, out=out))
        n_leading = len(self.dense) - 1  # `dense_coordinates` are the first ones and the last one
        dense_part = np.concatenate([v[..., :n_leading], v[..., -1:]], axis=-1)
        shape = dense_part.shape
        dense_part = _multiply_by_triangle(
            dense_part.reshape(-1, len(matrix)), matrix, transposed=transposed
        ).reshape(shape)
        rescaled = np.asarray(multiply_or_divide(v, self.scale, out=out))
        rescaled[..., :n_leading], rescaled[..., -1] = dense_part[..., :-1], dense_part[..., -1]
        return rescaled


def _multiply_by_triangle(vectors: Array, matrix: Array, *, transposed: bool) -> Array:
    """Return vectors (k, n) times a lower triangle (n, n) or its transpose."""
    (trmm,) = scipy.linalg.get_blas_funcs(("trmm",), (matrix,))
    return np.asarray(trmm(1.0, matrix, vectors.T, lower=1, trans_a=int(not transposed)).T)


def make_preconditioner(
    u: Array,
    values: Array,
    squared_values: Array,
    pair_products: Array,
    row_weights: Array,
    l2_strength: float,
) -> Preconditioner:
    """Return the preconditioner at the point u (n_outputs, R + 1), one output for a sigmoid.

    values: (n, R + 1) sampled rows, with their squares and their `dense_pair_products`.
    row_weights: (n,), with the sum of the weights of all training rows.
    """
    decisions = u @ values.T
    if len(u) == 1:
        p = sigmoid(decisions)
        class_basis, basis_p = np.ones((1, 1), u.dtype), p
        curvature = row_weights * p * (1 - p)
    else:
        p = softmax(decisions)
        class_basis = _class_eigenvectors(p, row_weights)
        basis_p = class_basis.T @ p
        curvature = row_weights * np.maximum((class_basis**2).T @ p - basis_p**2, 0)
    diagonal = curvature @ squared_values
    loss_curvature = float(diagonal[:, :-1].sum(dtype=np.float64))
    # The intercept is not penalized, but a class that is certain has no curvature there either: a
    # little keeps steps finite. More would hide the intercept's distance to its optimum from the
    # estimate that ends the iterations: at C = 1e-12 heads ended with intercepts near zero.
    floor = np.full(diagonal.shape[1], l2_strength, u.dtype)
    floor[-1] = min(l2_strength, INTERCEPT_FLOOR * float(row_weights.sum()))
    scale = np.sqrt(diagonal + floor)
    dense = dense_coordinates(len(u), diagonal.shape[1])
    if len(dense) == 0:
        empty = np.zeros((0, 0), u.dtype)
        return Preconditioner(class_basis, scale, dense, empty, empty, loss_curvature)
    hessian = _dense_hessian(p, basis_p, class_basis, row_weights, values[:, dense], pair_products)
    cholesky_factor = _factorize(
        hessian, np.tile(floor[dense], class_basis.shape[1]), scale[:, dense].ravel()
    )
    inverse_factor, _ = scipy.linalg.lapack.dtrtri(cholesky_factor, lower=1)
    return Preconditioner(
        class_basis,
        scale,
        dense,
        cholesky_factor.astype(u.dtype),
        inverse_factor.astype(u.dtype),
        loss_curvature,
    )


def dense_coordinates(n_outputs: int, n_coordinates: int) -> Index:
    """Return the coordinates (J,) whose whole Hessian is computed.

    The largest ones of the rows, which come first, and the intercept; or none.
    """
    n_free = n_outputs - 1
    # What the diagonal misses lies between classes: sigmoids take as many iterations without dense
    # coordinates (344) as with them (338).
    if not 0 < n_free <= MAX_CLASSES_FOR_DENSE:
        return np.zeros(0, np.intp)
    total = min(max(DENSE_COORDINATES, 10 * n_free), MAX_DENSE_COORDINATES)
    per_class = min(max(total // n_free, 1), n_coordinates)
    return np.append(np.arange(per_class - 1), n_coordinates - 1)


def dense_pair_products(values: Array, dense: Index) -> Array:
    """Return (n, J (J + 1) / 2) products of every two dense coordinates of rows (n, R + 1)."""
    first, second = np.triu_indices(len(dense))
    dense_values = values[:, dense]
    return np.asarray(dense_values[:, first] * dense_values[:, second])


def _dense_hessian(
    p: Array,
    basis_p: Array,
    class_basis: Array,
    row_weights: Array,
    dense_values: Array,
    pair_products: Array,
) -> Array:
    """Return the Hessian (c J, c J) of the loss in the dense coordinates, its lower triangle valid.

    float64, in Fortran's order: sums over rows of w (e_a' S e_b) z_j z_k, class directions a and b,
    dense coordinates j and k. basis_p: E' p (c, n). dense_values: (n, J).
    """
    c, n_dense = class_basis.shape[1], dense_values.shape[1]
    j, k = np.triu_indices(n_dense)
    blocks = np.empty((c, n_dense, c, n_dense))
    # e_a' S e_b is p' (e_a e_b) less (e_a' p) (e_b' p): the first is linear in p, and its sums are
    # few; the second is a Gram matrix of rows times class directions.
    class_sums = ((p * row_weights) @ pair_products).T
    linear = (class_basis.T * class_sums[:, None]) @ class_basis
    blocks[:, j, :, k] = blocks[:, k, :, j] = linear
    weighted_values = np.sqrt(row_weights) * dense_values.T
    outer = (basis_p[:, None] * weighted_values).reshape(c * n_dense, -1)
    (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), (outer,))
    hessian = blocks.reshape(c * n_dense, c * n_dense).T
    hessian -= syrk(1.0, outer.T, trans=1, lower=1)
    return hessian


def _factorize(hessian: Array, floor: Array, scale: Array) -> Array:
    """Return L with L L' = Hessian + diag(floor), (c J, c J) float64, in Fortran's order.

    Overwrites the Hessian. Falls back to diag(scale).
    """
    # A sum of float32 products is positive definite up to rounding only.
    hessian[np.diag_indices(len(hessian))] += floor + 1e-5 * hessian.diagonal()
    cholesky_factor, failed = scipy.linalg.lapack.dpotrf(hessian, lower=1, overwrite_a=1)
    return np.asfortranarray(np.diag(scale.astype(np.float64))) if failed else cholesky_factor


def _class_eigenvectors(p: Array, row_weights: Array) -> Array:
    """Return E (C, C - 1) of probabilities p (C, n), without the direction of all classes alike."""
    n_classes = len(p)
    if n_classes > MAX_CLASSES_FOR_EIGENVECTORS:
        # The reflection that takes the first axis to that direction: its other columns are
        # orthogonal to it.
        v = np.full(n_classes, -1 / np.sqrt(n_classes))
        v[0] += 1
        reflection = np.eye(n_classes) - np.outer(v, v) * (2 / (v @ v))
        return np.asarray(reflection[:, 1:].astype(p.dtype))
    class_curvature = np.diag((p * row_weights).sum(axis=1)) - (p * row_weights) @ p.T
    basis = np.linalg.eigh(class_curvature.astype(np.float64))[1][:, 1:].astype(p.dtype)
    # The dropped eigenvector is 1/sqrt(C) up to rounding and up to other classes without mass: make
    # that exact.
    basis -= basis.mean(axis=0)
    return np.asarray(np.linalg.qr(basis)[0])

"""Coordinates in which a logistic head's Hessian is near the identity.

C classes, R + 1 coordinates (the intercept last), n sampled rows, c = C - 1 free class directions
(1 for a sigmoid).

The Hessian of a softmax head is sum_i w_i S_i (x) z_i z_i', S_i = diag(p_i) - p_i p_i', plus the
penalty. The rows z are in the eigenbasis of their Gram matrix already. Classes are rotated
likewise, into eigenvectors E of sum_i w_i S_i, whose null direction (all classes alike) is dropped.
In the product of both bases the Hessian's exact diagonal,
    h[c, j] = sum_i w_i (e_c' S_i e_c) z_ij^2 + mu, costs one thin product over a sample of rows,
and its root is the scale of the coordinate: this is Kronecker-factored curvature with the diagonal
corrected (George et al., NeurIPS 2018), here computed, not learned. Measured against the fixed
bound 1/2 (I - 11'/C) of Böhning, conjugate gradients need 12 iterations instead of 16 at strong
regularisation, 25 instead of 53 at C = 1 (5,000 x 512 features, 10 classes, relative error 1e-4).

What the diagonal misses is strongest among the rows' few largest coordinates, between all classes.
There, and with the intercept, the Hessian of the sample is taken whole and its Cholesky factor
takes the place of the scales: along the path of 20 strengths and five folds a bank needs 787
iterations instead of 1,116 to 1e-5, 1,274 instead of 1,836 to 3e-7. A hundred and sixty coordinates
do what 480 do; blocks within classes alone win a tenth; a basis of the weighted Gram matrix at the
point, made of a sample, loses.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from headrace.heads.linear.solver.loss import sigmoid, softmax

Array = npt.NDArray[Any]
CLASSES_WORTH_EIGENVECTORS = 1024  # beyond, they cost more than the iterations that they save
INTERCEPT_FLOOR = 1e-4  # of the rows' mass
SAMPLED_ROWS, SAMPLED_ROWS_PER_CLASS = 2048, 20
DENSE, MOST_DENSE = (
    160,
    1024,
)  # coordinates taken together, over all classes; as many where classes are many
ROWS_AT_ONCE = 512  # of so many classes' pairs, 4 MB
ROWS_WORTH_A_PRODUCT = 4
# with fewer, the loop over coordinates costs more, and the difference of sums cancels
CLASSES_WORTH_LINEAR_SUMS = 64
# beyond, the products of pairs of classes cost more than the iterations that they save
CLASSES_WORTH_DENSE = 128


@dataclass(frozen=True)
class Frame:
    """Scaled coordinates x (c, R + 1) of a head's u (C, R + 1): with v = E' u, the coordinates
    `dense` of v, taken together, become L' v, and every other is multiplied by its own scale.
    """

    classes: Array  # E (C, c), orthonormal columns
    scale: Array  # (c, R + 1)
    dense: npt.NDArray[np.intp]  # (J,)
    root: Array  # L (c J, c J), lower triangular, in Fortran's order
    inverse: Array  # of L, likewise
    curvature: float  # of the loss, summed over all coordinates but the intercept's

    def scaled(self, u: Array) -> Array:
        """x of u (..., C, R + 1)."""
        v = self.classes.T @ u
        return self._changed(v, np.multiply, self.root, out=v)

    def unscaled(self, x: Array) -> Array:
        """u of x (..., c, R + 1)."""
        return np.asarray(self.classes @ self._changed(x, np.divide, self.inverse))

    def free(self, x: Array) -> Array:
        """The rows of u (..., C - 1, R + 1) but the last, which is minus their sum; of a sigmoid
        its only one.
        """
        return np.asarray(
            self.classes[: self.classes.shape[1]] @ self._changed(x, np.divide, self.inverse)
        )

    def turned(self, x: Array, other: "Frame") -> Array:
        """x (..., c, R + 1) of another frame, with its directions among classes instead of this
        one's, and scaled as it was.
        """
        return np.asarray((self.classes.T @ other.classes) @ x)

    def scaled_gradient(self, g: Array) -> Array:
        """Gradients with respect to x, of gradients g with respect to u (..., C, R + 1) or, where
        the last row of g is minus the sum of the others, of those alone (..., C - 1, R + 1).
        """
        classes = self.classes
        if g.shape[-2] < len(classes):
            classes = classes[:-1] - classes[-1]
        v = classes.T @ g
        return self._changed(v, np.divide, self.inverse, transposed=True, out=v)

    def unscaled_gradient(self, g: Array) -> Array:
        """Inverse of `scaled_gradient`."""
        return np.asarray(self.classes @ self._changed(g, np.multiply, self.root, transposed=True))

    def _changed(
        self,
        v: Array,
        change: np.ufunc,
        matrix: Array,
        *,
        transposed: bool = False,
        out: Array | None = None,
    ) -> Array:
        """v times or over the scales, its dense coordinates times the matrix or its transpose
        instead; in `out`, which may be v.
        """
        if len(self.dense) == 0:
            return np.asarray(change(v, self.scale, out=out))
        first = len(self.dense) - 1  # and the last: `dense_coordinates`
        part = np.concatenate([v[..., :first], v[..., -1:]], axis=-1)
        shape = part.shape
        part = _times_triangle(
            part.reshape(-1, len(matrix)), matrix, transposed=transposed
        ).reshape(shape)
        changed = np.asarray(change(v, self.scale, out=out))
        changed[..., :first], changed[..., -1] = part[..., :-1], part[..., -1]
        return changed


def _times_triangle(rows: Array, matrix: Array, *, transposed: bool) -> Array:
    """Rows (k, n), which may be overwritten, times a lower triangle (n, n) or its transpose: that
    reads half a matrix, and a few are faster one by one.
    """
    trans = int(not transposed)
    if len(rows) > ROWS_WORTH_A_PRODUCT:
        (multiply,) = scipy.linalg.get_blas_funcs(("trmm",), (matrix,))
        return np.asarray(multiply(1.0, matrix, rows.T, lower=1, trans_a=trans).T)
    (multiply,) = scipy.linalg.get_blas_funcs(("trmv",), (matrix,))
    for row in rows:
        row[:] = multiply(matrix, row, lower=1, trans=trans)
    return rows


def frame(
    u: Array, values: Array, squares: Array, products: Array, weight: Array, mu: float
) -> Frame:
    """Frame at the point u (C, R + 1), C = 1 a sigmoid, from sampled rows `values` (n, R + 1),
    their squares, their `row_products`, and weights (n,) that sum to the mass of all training rows.
    """
    decision = u @ values.T
    if len(u) == 1:
        p = sigmoid(decision)
        basis, mixed = np.ones((1, 1), u.dtype), p
        curvature = weight * p * (1 - p)
    else:
        p = softmax(decision)
        basis = _class_basis(p, weight)
        mixed = basis.T @ p
        curvature = weight * np.maximum((basis**2).T @ p - mixed**2, 0)
    h = curvature @ squares
    total = float(h[:, :-1].sum(dtype=np.float64))
    # The intercept is not penalised, but a class that is certain has no curvature there either: a
    # little keeps steps finite. More would hide the intercept's distance to its optimum from the
    # estimate that ends the iterations: at C = 1e-12 heads ended with intercepts near zero.
    floor = np.full(h.shape[1], mu, u.dtype)
    floor[-1] = min(mu, INTERCEPT_FLOOR * float(weight.sum()))
    scale = np.sqrt(h + floor)
    dense = dense_coordinates(len(u), h.shape[1])
    if len(dense) == 0:
        none = np.zeros((0, 0), u.dtype)
        return Frame(basis, scale, dense, none, none, total)
    hessian = _dense_hessian(p, mixed, basis, weight, values[:, dense], products)
    root = _root(hessian, np.tile(floor[dense], basis.shape[1]), scale[:, dense].ravel())
    inverse, _ = scipy.linalg.lapack.dtrtri(root, lower=1)
    return Frame(basis, scale, dense, root.astype(u.dtype), inverse.astype(u.dtype), total)


def dense_coordinates(classes: int, width: int) -> npt.NDArray[np.intp]:
    """(J,) the coordinates that are taken together over all classes: the rows' largest, and the
    intercept; or none.
    """
    free = classes - 1
    # What the diagonal misses lies between classes: sigmoids take as many iterations without (344)
    # as with it (338).
    if not 0 < free <= CLASSES_WORTH_DENSE:
        return np.zeros(0, np.intp)
    count = min(max(min(max(DENSE, 10 * free), MOST_DENSE) // free, 1), width)
    return np.append(np.arange(count - 1), width - 1)


def row_products(values: Array, dense: npt.NDArray[np.intp]) -> Array:
    """(n, J (J + 1) / 2) products of every two dense coordinates of rows (n, R + 1)."""
    one, other = np.triu_indices(len(dense))
    part = values[:, dense]
    return np.asarray(part[:, one] * part[:, other])


def _dense_hessian(
    p: Array, mixed: Array, basis: Array, weight: Array, values: Array, products: Array
) -> Array:
    """(c J, c J) float64, in Fortran's order, its lower triangle sums over rows of weight (e_a' S
    e_b) z_j z_k, class directions a and b, dense coordinates j and k of the rows `values` (n, J).
    mixed: E' p (c, n).
    """
    c, size = basis.shape[1], values.shape[1]
    one, other = np.triu_indices(size)
    blocks = np.empty((c, size, c, size))
    if c < CLASSES_WORTH_LINEAR_SUMS:
        first, second = np.triu_indices(c)
        both = (basis[:, first] * basis[:, second]).T
        total = np.zeros((len(first), products.shape[1]), p.dtype)
        for start in range(0, len(products), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            own = both @ p[:, rows] - mixed[first, rows] * mixed[second, rows]
            total += (own * weight[rows]) @ products[rows]
        pairs = np.empty((len(first), size, size))
        pairs[:, one, other] = pairs[:, other, one] = total
        blocks[first, :, second] = blocks[second, :, first] = pairs
        return blocks.reshape(c * size, c * size).T
    # e_a' S e_b is p' (e_a e_b) less (e_a' p) (e_b' p): the first is linear in p, and its sums are
    # few; the second is a Gram matrix of rows times class directions.
    linear = (basis.T * ((p * weight) @ products).T[:, None]) @ basis
    blocks[:, one, :, other] = blocks[:, other, :, one] = linear
    crossed = (mixed[:, None] * (np.sqrt(weight) * values.T)).reshape(c * size, -1)
    (gram,) = scipy.linalg.get_blas_funcs(("syrk",), (crossed,))
    hessian = blocks.reshape(c * size, c * size).T
    hessian -= gram(1.0, crossed.T, trans=1, lower=1)
    return hessian


def _root(hessian: Array, floor: Array, scale: Array) -> Array:
    """L (c J, c J) float64, in Fortran's order, with L L' the Hessian, which is overwritten, and
    the floor on its diagonal.
    """
    # A sum of float32 products is positive definite up to rounding only.
    hessian[np.diag_indices(len(hessian))] += floor + 1e-5 * hessian.diagonal()
    root, failed = scipy.linalg.lapack.dpotrf(hessian, lower=1, overwrite_a=1)
    return np.asfortranarray(np.diag(scale.astype(np.float64))) if failed else root


def _class_basis(p: Array, weight: Array) -> Array:
    """E (C, C - 1) of probabilities p (C, n) and weights (n,), without the direction of all classes
    alike.
    """
    classes = len(p)
    if classes > CLASSES_WORTH_EIGENVECTORS:
        # The reflection that takes the first axis to that direction: its other columns are
        # orthogonal to it.
        v = np.full(classes, -1 / np.sqrt(classes))
        v[0] += 1
        reflection = np.eye(classes) - np.outer(v, v) * (2 / (v @ v))
        return np.asarray(reflection[:, 1:].astype(p.dtype))
    spread = np.diag((p * weight).sum(axis=1)) - (p * weight) @ p.T
    basis = np.linalg.eigh(spread.astype(np.float64))[1][:, 1:].astype(p.dtype)
    # The dropped eigenvector is 1/sqrt(C) up to rounding and up to other classes without mass: make
    # that exact.
    basis -= basis.mean(axis=0)
    return np.asarray(np.linalg.qr(basis)[0])

// Copyright 2026 The SAILViT package authors.
// SPDX-License-Identifier: Apache-2.0
//
// Principal components of tokens as colours: what PrincipalColours and stitch_tiles of evaluate/pictures.py compute.
// A vector is a Float64Array, a basis an array of vectors; tokens are arrays of numbers, one token after the other.

const BLOCK = 16; // directions that are iterated, of which three are wanted: the more, the fewer iterations
const TOLERANCE = 1e-8; // of |A v - a v| for every direction v, relative to the largest eigenvalue a
const MOST_ITERATIONS = 1000;
const QUANTILES = [0.01, 0.99];

/**
 * Return tokens (rows * side, columns * side, depth) of the whole image from (tiles, side * side, depth).
 *
 * The tile of a 1 x 1 grid is the last of all; those before it are of the second grid of `msac`.
 */
export function stitchTiles(tokens, [columns, rows], side, depth) {
  const stitched = new Float32Array(rows * side * columns * side * depth);
  if (columns * rows === 1) tokens = tokens.subarray(-stitched.length);
  for (let tile = 0; tile < columns * rows; tile++) {
    for (let y = 0; y < side; y++) {
      const from = (tile * side + y) * side * depth;
      const row = Math.floor(tile / columns) * side + y;
      stitched.set(tokens.subarray(from, from + side * depth), (row * columns + (tile % columns)) * side * depth);
    }
  }
  return stitched;
}

/**
 * Colour tokens (n, depth), depth >= 3, by their first three principal components: red, green, blue.
 *
 * A component has level 0 at its 1% quantile and 255 at its 99% quantile. The largest entry of its direction is positive.
 * Returns {levels, shares}: levels (n, 3) of 0 to 255, and the share of the variance that each component has.
 */
export function principalColours(tokens, depth) {
  const centred = centre(tokens, depth);
  const { directions, variances } = principalDirections(centred, depth);
  const total = centred.reduce((sum, value) => sum + value * value, 0);
  const levels = new Uint8ClampedArray((tokens.length / depth) * 3);
  directions.forEach((direction, channel) => {
    const component = project(centred, orient(direction));
    const [low, high] = quantiles(component);
    const range = Math.max(high - low, 1e-12);
    component.forEach((value, index) => (levels[3 * index + channel] = (255 * (value - low)) / range));
  });
  return { levels, shares: variances.map((variance) => variance / Math.max(total, 1e-30)) };
}

function centre(tokens, depth) {
  const mean = new Float64Array(depth);
  tokens.forEach((value, index) => (mean[index % depth] += value));
  return Float64Array.from(tokens, (value, index) => value - (mean[index % depth] * depth) / tokens.length);
}

/** Return the first three eigenvectors of A = X^T X and their eigenvalues, by subspace iteration with Rayleigh-Ritz. */
function principalDirections(centred, depth) {
  let basis = orthonormal(startVectors(Math.min(BLOCK, depth), depth));
  for (let iteration = 0; iteration < MOST_ITERATIONS; iteration++) {
    const images = basis.map((vector) => applyCovariance(centred, vector));
    const { values, vectors } = eigen(basis.map((row) => images.map((image) => dot(row, image))));
    const directions = vectors.map((vector) => combine(basis, vector));
    const next = vectors.map((vector) => combine(images, vector));
    const residuals = [0, 1, 2].map((index) => distance(next[index], directions[index], values[index]));
    if (Math.max(...residuals) <= TOLERANCE * values[0]) {
      return { directions: directions.slice(0, 3), variances: values.slice(0, 3) };
    }
    basis = orthonormal(next);
  }
  throw new Error("The principal components of the tokens did not converge.");
}

/** Return vectors of numbers without a pattern, the same at every call. */
function startVectors(count, depth) {
  const start = (row) => Float64Array.from({ length: depth }, (_, i) => Math.sin((row * depth + i + 1) ** 2));
  return Array.from({ length: count }, (_, row) => start(row));
}

/** Gram-Schmidt, twice, so that vectors that nearly depend on others are orthogonal too. */
function orthonormal(vectors) {
  const basis = [];
  for (const vector of vectors) {
    for (let twice = 0; twice < 2; twice++) {
      for (const other of basis) subtract(vector, other, dot(vector, other));
      const norm = Math.sqrt(dot(vector, vector)) || 1;
      for (let i = 0; i < vector.length; i++) vector[i] /= norm;
    }
    basis.push(vector);
  }
  return basis;
}

/** Return eigenvalues and eigenvectors of a small symmetric matrix, the largest first, by Jacobi rotations. */
function eigen(matrix) {
  const size = matrix.length;
  const vectors = matrix.map((_, row) => Float64Array.from({ length: size }, (_, column) => Number(row === column)));
  for (let sweep = 0; sweep < 30; sweep++) {
    for (let p = 0; p < size; p++) for (let q = p + 1; q < size; q++) rotate(matrix, vectors, p, q);
  }
  const order = [...matrix.keys()].sort((a, b) => matrix[b][b] - matrix[a][a]);
  return { values: order.map((index) => matrix[index][index]), vectors: order.map((index) => vectors[index]) };
}

/** Rotate rows and columns p and q so that the entry (p, q) becomes zero. */
function rotate(matrix, vectors, p, q) {
  if (matrix[p][q] === 0) return;
  const angle = 0.5 * Math.atan2(2 * matrix[p][q], matrix[p][p] - matrix[q][q]);
  const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
  for (let k = 0; k < matrix.length; k++) {
    [matrix[k][p], matrix[k][q]] = [cos * matrix[k][p] + sin * matrix[k][q], cos * matrix[k][q] - sin * matrix[k][p]];
  }
  for (const rows of [matrix, vectors]) {
    for (let k = 0; k < matrix.length; k++) {
      [rows[p][k], rows[q][k]] = [cos * rows[p][k] + sin * rows[q][k], cos * rows[q][k] - sin * rows[p][k]];
    }
  }
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function subtract(vector, other, factor) {
  for (let i = 0; i < vector.length; i++) vector[i] -= factor * other[i];
}

/** Return |a - factor * b|. */
function distance(a, b, factor) {
  const difference = Float64Array.from(a);
  subtract(difference, b, factor);
  return Math.sqrt(dot(difference, difference));
}

/** Return the sum of vectors, each times its factor. */
function combine(vectors, factors) {
  const sum = new Float64Array(vectors[0].length);
  vectors.forEach((vector, index) => subtract(sum, vector, -factors[index]));
  return sum;
}

/** Return X^T X v. */
function applyCovariance(centred, vector) {
  const sum = new Float64Array(vector.length);
  for (let at = 0; at < centred.length; at += vector.length) {
    const token = centred.subarray(at, at + vector.length);
    subtract(sum, token, -dot(token, vector));
  }
  return sum;
}

/** Return a direction or its opposite: the one whose largest entry is positive. */
function orient(direction) {
  const largest = direction.reduce((best, value) => (Math.abs(value) > Math.abs(best) ? value : best), 0);
  return direction.map((value) => value * Math.sign(largest));
}

function project(centred, direction) {
  const depth = direction.length;
  const token = (index) => centred.subarray(index * depth, (index + 1) * depth);
  return Float64Array.from({ length: centred.length / depth }, (_, index) => dot(token(index), direction));
}

/** Return quantiles, interpolated between values as numpy does. */
function quantiles(values) {
  const sorted = values.slice().sort();
  return QUANTILES.map((share) => {
    const at = share * (sorted.length - 1);
    const below = Math.floor(at);
    return sorted[below] + (at - below) * (sorted[Math.min(below + 1, sorted.length - 1)] - sorted[below]);
  });
}

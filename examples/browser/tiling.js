// Copyright 2026 The SAILViT package authors.
// SPDX-License-Identifier: Apache-2.0
//
// An image as normalized tiles: what image_processing_sailvit.py computes, for 8-bit RGB and bicubic resizing.
// An image is {width, height, data}, `data` a Uint8Array of (height, width, 3); a grid is [columns, rows].

const BICUBIC = 3; // PIL.Image.Resampling
const PILLOW_BITS = 22; // of the weights of Pillow
const TORCH_BITS = 15; // torch keeps its weights as 16-bit integers
const STRIP = 2 ** 22; // pixels of a canvas; phones limit its size

/** Return a JPEG without its EXIF, by which browsers always rotate; any other file as it is. */
export async function dropExif(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (bytes[0] !== 0xff || bytes[1] !== 0xd8) return file;
  const segments = [bytes.subarray(0, 2)];
  let at = 2;
  while (bytes[at] === 0xff && bytes[at + 1] !== 0xda) { // the scan, after which there are no more segments
    const next = at + 2 + 256 * bytes[at + 2] + bytes[at + 3];
    if (bytes[at + 1] !== 0xe1) segments.push(bytes.subarray(at, next));
    at = next;
  }
  return new Blob([...segments, bytes.subarray(at)], { type: file.type });
}

/** Return a bitmap as an image; alpha is dropped. */
export function readImage(bitmap) {
  const { width, height } = bitmap;
  const data = new Uint8Array(width * height * 3);
  const rows = Math.min(Math.max(Math.floor(STRIP / width), 1), height);
  const context = new OffscreenCanvas(width, rows).getContext("2d", { willReadFrequently: true });
  for (let top = 0; top < height; top += rows) {
    context.clearRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, -top);
    const colours = context.getImageData(0, 0, width, Math.min(rows, height - top)).data;
    for (let from = 0, to = 3 * top * width; from < colours.length; from += 4) {
      for (let channel = 0; channel < 3; channel++) data[to++] = colours[from + channel];
    }
  }
  return { width, height, data };
}

/** Return all grids of minTiles to maxTiles tiles, sorted by tiles, then by columns. */
export function tileGrids(minTiles, maxTiles) {
  const grids = [];
  for (let columns = 1; columns <= maxTiles; columns++) {
    for (let rows = 1; columns * rows <= maxTiles; rows++) if (columns * rows >= minTiles) grids.push([columns, rows]);
  }
  return grids.sort((a, b) => a[0] * a[1] - b[0] * b[1]);
}

/** Return the grid whose aspect ratio is nearest to that of an image, by the rule of the released SAIL-VL code. */
export function chooseTileGrid(width, height, minTiles, maxTiles, tileSize) {
  return nearestGrid(tileGrids(minTiles, maxTiles), width, height, tileSize);
}

/** Return the second grid of msac, whose columns or rows do not divide those of the first; [1, 1] if there is none. */
export function chooseSecondGrid([columns, rows], width, height, minTiles, maxTiles, tileSize) {
  const grids = tileGrids(minTiles, maxTiles).filter((grid) => columns % grid[0] || rows % grid[1]);
  return nearestGrid(grids, width, height, tileSize);
}

function nearestGrid(grids, width, height, tileSize) {
  let [best, bestDistance] = [[1, 1], Infinity];
  for (const [columns, rows] of grids) {
    const distance = Math.abs(width / height - (columns * tileSize.width) / (rows * tileSize.height));
    const isLarge = width * height > 0.5 * tileSize.height * tileSize.width * columns * rows;
    if (distance < bestDistance || (distance === bestDistance && isLarge)) {
      [best, bestDistance] = [[columns, rows], distance];
    }
  }
  return best;
}

/** Return the grids that an image is cut into, in order: its own, the second of msac, [1, 1] for the thumbnail. */
export function allGrids(width, height, options) {
  const first = chooseGrid(width, height, options);
  const isOne = first[0] * first[1] === 1;
  const second = [];
  if (options.msac && options.do_tile) {
    second.push(chooseSecondGrid(first, width, height, options.min_tiles, options.max_tiles, options.size));
  }
  return [...(isOne ? [] : [first]), ...second, ...(isOne || options.use_thumbnail ? [[1, 1]] : [])];
}

function chooseGrid(width, height, { do_tile: doTile, min_tiles: minTiles, max_tiles: maxTiles, size }) {
  return doTile ? chooseTileGrid(width, height, minTiles, maxTiles, size) : [1, 1];
}

/**
 * Cut an image into tiles, normalized as preprocessor_config.json says.
 *
 * Returns {grid, count, pixels}: the grid of the image, the number of tiles, and pixel_values (count, 3, height, width)
 * as a Float32Array. Throws an Error with a sentence if an option is not supported.
 */
export function tileImage(image, options) {
  checkOptions(options);
  const { width, height } = options.size;
  const grids = allGrids(image.width, image.height, options);
  const count = grids.reduce((sum, [columns, rows]) => sum + columns * rows, 0);
  const pixels = new Float32Array(count * 3 * height * width);
  let at = 0;
  for (const [columns, rows] of grids) {
    const canvas = resize(image, columns * width, rows * height, options.resize_backend);
    for (let tile = 0; tile < columns * rows; tile++, at += 3 * height * width) {
      const corner = [(tile % columns) * width, Math.floor(tile / columns) * height];
      normalizeInto(pixels.subarray(at, at + 3 * height * width), canvas, corner, options);
    }
  }
  return { grid: chooseGrid(image.width, image.height, options), count, pixels };
}

function checkOptions({ resample, resize_backend: backend }) {
  const check = (right, name, expected, got) => {
    if (!right) throw new Error(`preprocessor_config.json: ${name}: expected ${expected}, got ${got}.`);
  };
  check(resample === BICUBIC, "resample", `${BICUBIC} (bicubic)`, resample);
  check(["torchvision", "pil"].includes(backend), "resize_backend", "torchvision or pil", backend);
}

/** Fill one tile (3, height, width) from the pixels right of and below a corner. */
function normalizeInto(target, canvas, [left, top], options) {
  const { width, height } = options.size;
  const scale = options.do_rescale ? options.rescale_factor : 1;
  for (let channel = 0, at = 0; channel < 3; channel++) {
    const [mean, std] = options.do_normalize ? [options.image_mean[channel], options.image_std[channel]] : [0, 1];
    for (let y = 0; y < height; y++) {
      let from = 3 * ((top + y) * canvas.width + left) + channel;
      for (let x = 0; x < width; x++, from += 3) target[at++] = (canvas.data[from] * scale - mean) / std;
    }
  }
}

/**
 * Resize an image with the bicubic filter of Pillow, which widens when it reduces (antialias), one dimension after the
 * other, rounded after each. `backend` gives the weights the precision of torchvision or of Pillow ("pil").
 */
export function resize(image, width, height, backend) {
  const [shrinkX, shrinkY] = [image.width - width, image.height - height];
  const verticalFirst = shrinkY > 0 && shrinkY > 2 * shrinkX; // as Pillow since 13.0
  const passes = [resizeWidth, resizeHeight];
  if (verticalFirst) passes.reverse();
  return passes.reduce((resized, pass) => pass(resized, pass === resizeWidth ? width : height, backend), image);
}

function resizeWidth(image, width, backend) {
  const data = resizeAxis(image.data, [image.height, image.width, 3], width, backend);
  return { width, height: image.height, data };
}

function resizeHeight(image, height, backend) {
  const data = resizeAxis(image.data, [1, image.height, image.width * 3], height, backend);
  return { width: image.width, height, data };
}

/** Return bytes (outer, size, inner) from bytes (outer, length, inner). */
function resizeAxis(data, [outer, length, inner], size, backend) {
  const { windows, bits } = filterWindows(length, size, backend);
  const resized = new Uint8ClampedArray(outer * size * inner);
  let at = 0;
  for (let row = 0; row < outer; row++) {
    for (const { start, weights } of windows) {
      const first = (row * length + start) * inner;
      for (let i = 0; i < inner; i++) {
        let sum = 1 << (bits - 1);
        for (let k = 0, from = first + i; k < weights.length; k++, from += inner) sum += weights[k] * data[from];
        resized[at++] = sum >> bits;
      }
    }
  }
  return resized;
}

/** Return the first pixel and the weights of every resized pixel; weights are integers, in units of 2^-bits. */
function filterWindows(length, size, backend) {
  const scale = length / size;
  const windows = [...Array(size).keys()].map((at) => filterWindow(length, (at + 0.5) * scale, Math.max(scale, 1)));
  const largest = windows.reduce((most, { weights }) => Math.max(most, ...weights), 0);
  const bits = backend === "pil" ? PILLOW_BITS : torchBits(largest);
  const toInteger = (weight) => Math.sign(weight) * Math.floor(Math.abs(weight) * 2 ** bits + 0.5);
  const rounded = windows.map(({ start, weights }) => ({ start, weights: Int32Array.from(weights, toInteger) }));
  return { windows: rounded, bits };
}

function filterWindow(length, centre, scale) {
  const start = Math.max(Math.trunc(centre - 2 * scale + 0.5), 0);
  const stop = Math.min(Math.trunc(centre + 2 * scale + 0.5), length);
  const weights = Array.from({ length: stop - start }, (_, k) => cubic((start + k - centre + 0.5) / scale));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return { start, weights: weights.map((weight) => weight / sum) };
}

/** Keys' cubic convolution with a = -0.5. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/** Return the largest number of bits with which the largest weight is still a 16-bit integer, at most Pillow's. */
function torchBits(largest) {
  let bits = 0;
  while (bits < PILLOW_BITS && Math.floor(0.5 + largest * 2 ** (bits + 1)) < 2 ** TORCH_BITS) bits++;
  return bits;
}

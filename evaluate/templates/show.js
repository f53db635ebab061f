"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
  const facts = JSON.parse(byId("facts").textContent);
  const [columns, rows] = facts.grid;
  const [patchRows, patchColumns] = facts.patches;
  const patches = patchRows * patchColumns;
  const mainTiles = columns * rows;
  const tiles = mainTiles + (facts.thumbnail ? 1 : 0);
  const attention = facts.attention;
  const state = {
    tile: facts.place[0], row: facts.place[1], column: facts.place[2],
    block: attention ? attention.blocks[attention.blocks.length - 1] : 0, head: -1, pinned: false,
  };

  // Data: base64 of a zlib stream, decoded when it is first needed.

  const decoded = new Map();

  function load(name) {
    if (!decoded.has(name)) decoded.set(name, decode(byId(`data-${name}`)));
    return decoded.get(name);
  }

  async function decode(element) {
    const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
    element.remove();
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  let vectors = null; // unit tokens, one after the other

  async function loadTokens() {
    const codes = new Int8Array(await load("tokens"));
    const size = facts.scales.length;
    const values = new Float32Array(codes.length);
    for (let token = 0; token < codes.length; token += size) {
      let square = 0;
      for (let k = 0; k < size; k++) {
        const value = codes[token + k] * facts.scales[k];
        values[token + k] = value;
        square += value * value;
      }
      const norm = Math.sqrt(square) || 1;
      for (let k = 0; k < size; k++) values[token + k] /= norm;
    }
    vectors = values;
  }

  const weights = new Map(); // "mean" or a block -> {scales, codes}, once it is loaded

  async function loadWeights(name, scaleCount) {
    const buffer = await load(name);
    weights.set(name, { scales: new Float32Array(buffer, 0, scaleCount), codes: new Uint8Array(buffer, 4 * scaleCount) });
  }

  function squares(side) {
    const across = Math.ceil(patchColumns / side);
    return { side, across, count: across * Math.ceil(patchRows / side) };
  }

  const queries = attention && squares(attention.querySide);
  const keys = attention && squares(attention.keySide);
  const means = attention && squares(attention.meanSide);

  // Numbers of the page, by patch

  const indexOf = (tile, row, column) => tile * patches + row * patchColumns + column;

  function cosine(token) {
    const size = facts.scales.length, result = new Float32Array(tiles * patches);
    const query = vectors.subarray(token * size, (token + 1) * size);
    for (let other = 0, at = 0; other < result.length; other++) {
      let sum = 0;
      for (let k = 0; k < size; k++, at++) sum += query[k] * vectors[at];
      result[other] = sum;
    }
    return result;
  }

  function addRegions(sum, codes, start, scale, share) {
    for (let k = 0; k < sum.length; k++) {
      const code = codes[start + k] / 255;
      sum[k] += scale * code * code * share;
    }
  }

  // Attention (regions of keys) of a query by one head, or by the mean of all heads (-1).
  function attentionOf(block, head, tile, row, column) {
    const { scales, codes } = weights.get(`block-${block}`);
    const query = Math.floor(row / queries.side) * queries.across + Math.floor(column / queries.side);
    const sum = new Float32Array(keys.count);
    const chosen = head < 0 ? [...Array(attention.heads).keys()] : [head];
    for (const each of chosen) {
      const at = (tile * attention.heads + each) * queries.count + query;
      addRegions(sum, codes, at * keys.count, scales[at], 1 / chosen.length);
    }
    return sum;
  }

  // Attention averaged over all queries of a tile.
  function meanAttention(block, head, tile) {
    const { scales, codes } = weights.get("mean");
    const sum = new Float32Array(means.count);
    const chosen = head < 0 ? [...Array(attention.heads).keys()] : [head];
    for (const each of chosen) {
      const at = block * attention.heads + each;
      addRegions(sum, codes, (at * tiles + tile) * means.count, scales[at], 1 / chosen.length);
    }
    return sum;
  }

  // Drawing

  function colourTable(steps) {
    const table = new Uint8ClampedArray(256 * 3);
    const parts = steps.map((text) => [0, 2, 4].map((at) => parseInt(text.slice(at, at + 2), 16)));
    for (let level = 0; level < 256; level++) {
      const at = (level / 255) * (parts.length - 1), low = Math.min(Math.floor(at), parts.length - 2);
      for (let c = 0; c < 3; c++) table[3 * level + c] = parts[low][c] + (parts[low + 1][c] - parts[low][c]) * (at - low);
    }
    return table;
  }

  const tables = { viridis: colourTable(facts.viridis), inferno: colourTable(facts.inferno) };

  function setPixel(pixels, at, table, level) {
    const colour = 3 * Math.max(0, Math.min(255, Math.round(255 * level)));
    pixels[4 * at] = table[colour];
    pixels[4 * at + 1] = table[colour + 1];
    pixels[4 * at + 2] = table[colour + 2];
    pixels[4 * at + 3] = 255;
  }

  // Fill the patches of one tile in an image; level(row, column) is in 0..1.
  function fillTile(image, tile, table, level) {
    const left = tile < mainTiles ? (tile % columns) * patchColumns : 0;
    const top = tile < mainTiles ? Math.floor(tile / columns) * patchRows : 0;
    for (let row = 0; row < patchRows; row++) {
      for (let column = 0; column < patchColumns; column++) {
        setPixel(image.data, (top + row) * image.width + left + column, table, level(row, column));
      }
    }
  }

  function canvasesOf(view) {
    return all(`[data-view=${view}] .stage canvas`); // main, thumbnail
  }

  function newImages(view) {
    return canvasesOf(view).map((canvas) => canvas.getContext("2d").createImageData(canvas.width, canvas.height));
  }

  function putImages(view, images) {
    canvasesOf(view).forEach((canvas, index) => canvas.getContext("2d").putImageData(images[index], 0, 0));
  }

  function setLegend(view, low, high) {
    const ends = all(`[data-view=${view}] .legend b`);
    ends[0].textContent = format(low);
    ends[1].textContent = format(high);
  }

  function format(value) {
    if (value === 0) return "0";
    return Math.abs(value) < 0.001 ? value.toExponential(0) : value.toFixed(value < 0.1 ? 3 : 2);
  }

  function drawSimilarity() {
    if (!vectors) return;
    const values = cosine(indexOf(state.tile, state.row, state.column));
    const sorted = Float32Array.from(values).sort();
    const low = sorted[Math.floor(0.02 * (sorted.length - 1))], high = sorted[Math.floor(0.995 * (sorted.length - 1))];
    const images = newImages("similarity");
    for (let tile = 0; tile < tiles; tile++) {
      fillTile(images[tile < mainTiles ? 0 : 1], tile, tables.viridis, (row, column) =>
        (values[indexOf(tile, row, column)] - low) / (high - low || 1));
    }
    putImages("similarity", images);
    setLegend("similarity", low, high);
  }

  // The patch at the same place of the picture, in the thumbnail or, from there, in the tiles.
  function counterpart() {
    if (!facts.thumbnail) return null;
    const wide = columns * patchColumns, high = rows * patchRows;
    if (state.tile < mainTiles) {
      const x = (state.tile % columns) * patchColumns + state.column + 0.5;
      const y = Math.floor(state.tile / columns) * patchRows + state.row + 0.5;
      return { tile: mainTiles, row: Math.floor((y / high) * patchRows), column: Math.floor((x / wide) * patchColumns) };
    }
    return patchAt((state.column + 0.5) / patchColumns, (state.row + 0.5) / patchRows);
  }

  function patchAt(x, y) {
    const column = Math.min(Math.floor(x * columns * patchColumns), columns * patchColumns - 1);
    const row = Math.min(Math.floor(y * rows * patchRows), rows * patchRows - 1);
    const tile = Math.floor(row / patchRows) * columns + Math.floor(column / patchColumns);
    return { tile, row: row % patchRows, column: column % patchColumns };
  }

  const isByQuery = (block) => attention.blocks.includes(block);

  function rangeOf(values) {
    let low = Infinity, high = 0;
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    return [low, high];
  }

  // Colours of attention follow the square root, from the smallest to the largest weight of a map.
  function rootLevel([low, high]) {
    const start = Math.sqrt(low), length = Math.sqrt(high) - start || 1;
    return (value) => (Math.sqrt(value) - start) / length;
  }

  function regionLevels(values, regions) {
    const level = rootLevel(rangeOf(values));
    return (row, column) =>
      level(values[Math.floor(row / regions.side) * regions.across + Math.floor(column / regions.side)]);
  }

  function drawAttention() {
    if (!attention || !weights.has("mean") || (isByQuery(state.block) && !weights.has(`block-${state.block}`))) return;
    const images = newImages("attention");
    let range = [0, 0];
    if (isByQuery(state.block)) {
      for (const place of [counterpart(), state]) {
        if (!place) continue;
        const values = attentionOf(state.block, state.head, place.tile, place.row, place.column);
        fillTile(images[place.tile < mainTiles ? 0 : 1], place.tile, tables.inferno, regionLevels(values, keys));
        range = rangeOf(values);
      }
    } else {
      for (let tile = 0; tile < tiles; tile++) {
        const values = meanAttention(state.block, state.head, tile);
        fillTile(images[tile < mainTiles ? 0 : 1], tile, tables.inferno, regionLevels(values, means));
        if (tile === state.tile) range = rangeOf(values);
      }
    }
    putImages("attention", images);
    setLegend("attention", ...range);
    const who = state.head < 0 ? "mean of heads" : `head ${state.head + 1}`;
    byId("which").textContent = `block ${state.block + 1}, ${who}${isByQuery(state.block) ? "" : ", all queries"}`;
    drawHeads();
  }

  function drawHeads() {
    all("#heads canvas").forEach((canvas, index) => {
      const head = index - 1, byQuery = isByQuery(state.block);
      const values = byQuery
        ? attentionOf(state.block, head, state.tile, state.row, state.column)
        : meanAttention(state.block, head, state.tile);
      const image = canvas.getContext("2d").createImageData(patchColumns, patchRows);
      const level = regionLevels(values, byQuery ? keys : means);
      for (let row = 0; row < patchRows; row++) {
        for (let column = 0; column < patchColumns; column++) {
          setPixel(image.data, row * patchColumns + column, tables.inferno, level(row, column));
        }
      }
      canvas.getContext("2d").putImageData(image, 0, 0);
    });
  }

  function drawRings() {
    const twin = counterpart();
    for (const stage of all(".view .stage")) {
      const isMain = stage.dataset.part === "main", ring = stage.querySelector(".ring");
      const own = isMain === state.tile < mainTiles, place = own ? state : twin;
      ring.classList.toggle("echo", !own);
      const [across, down] = isMain ? [columns, rows] : [1, 1];
      const tile = isMain ? place.tile : 0;
      ring.style.left = `${(100 * ((tile % columns) + (place.column + 0.5) / patchColumns)) / across}%`;
      ring.style.top = `${(100 * (Math.floor(tile / columns) + (place.row + 0.5) / patchRows)) / down}%`;
    }
  }

  function describePlace() {
    const inMain = state.tile < mainTiles;
    const across = inMain ? columns : 1, down = inMain ? rows : 1;
    const x = ((inMain ? state.tile % columns : 0) + (state.column + 0.5) / patchColumns) / across;
    const y = ((inMain ? Math.floor(state.tile / columns) : 0) + (state.row + 0.5) / patchRows) / down;
    const tile = inMain ? `tile ${state.tile + 1} of ${mainTiles}` : "thumbnail tile";
    const pixel = `pixel ${Math.round(x * facts.size[0])}, ${Math.round(y * facts.size[1])}`;
    return `Query: ${tile}, row ${state.row + 1}, column ${state.column + 1} of its patches (${pixel})`;
  }

  let isScheduled = false;

  function draw() {
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => {
      isScheduled = false;
      byId("where").textContent = describePlace();
      byId("pin").setAttribute("aria-pressed", state.pinned);
      byId("pin").textContent = state.pinned ? "Pinned" : "Pin";
      drawRings();
      drawSimilarity();
      drawAttention();
    });
  }

  // Moving the query

  function moveTo(place) {
    Object.assign(state, { tile: place.tile, row: place.row, column: place.column });
    draw();
  }

  function placeOf(stage, event) {
    const box = stage.getBoundingClientRect();
    const x = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 0.999999);
    const y = Math.min(Math.max((event.clientY - box.top) / box.height, 0), 0.999999);
    if (stage.dataset.part === "main") return patchAt(x, y);
    return { tile: mainTiles, row: Math.floor(y * patchRows), column: Math.floor(x * patchColumns) };
  }

  const isSame = (place) => place.tile === state.tile && place.row === state.row && place.column === state.column;

  function listen(stage) {
    stage.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" ? !state.pinned : event.pressure > 0) moveTo(placeOf(stage, event));
    });
    stage.addEventListener("click", (event) => {
      const place = placeOf(stage, event);
      state.pinned = !(state.pinned && isSame(place));
      moveTo(place);
    });
  }

  function step(right, down) {
    const inMain = state.tile < mainTiles, across = inMain ? columns : 1, deep = inMain ? rows : 1;
    const tile = inMain ? state.tile : 0;
    const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);
    const x = clamp((tile % across) * patchColumns + state.column + right, across * patchColumns);
    const y = clamp(Math.floor(tile / across) * patchRows + state.row + down, deep * patchRows);
    moveTo({
      tile: inMain ? Math.floor(y / patchRows) * columns + Math.floor(x / patchColumns) : mainTiles,
      row: y % patchRows,
      column: x % patchColumns,
    });
  }

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inControl = event.target.closest("button, input, a");
    const onStage = event.target.closest(".stage");
    if (ARROWS[event.key] && !inControl) {
      if (!onStage && !state.pinned) return; // scrolls the page
      const length = event.shiftKey ? 4 : 1;
      state.pinned = true;
      step(ARROWS[event.key][0] * length, ARROWS[event.key][1] * length);
    } else if (event.key === " " && onStage) {
      state.pinned = !state.pinned;
      draw();
    } else if (event.key === "Escape") {
      state.pinned = false;
      draw();
    } else if (attention && (event.key === "[" || event.key === "]")) {
      chooseBlock(state.block + (event.key === "]" ? 1 : -1));
    } else if (attention && (event.key === "," || event.key === ".")) {
      chooseHead(state.head + (event.key === "." ? 1 : -1));
    } else return;
    event.preventDefault();
  }

  // Blocks and heads

  function chooseBlock(block) {
    state.block = Math.min(Math.max(block, 0), attention.total - 1);
    const byQuery = isByQuery(state.block);
    byId("block-number").textContent = state.block + 1;
    byId("heads-lead").textContent = byQuery
      ? "What the query pays to the patches of its tile, by head. Each map has its own range; colours follow the square root."
      : "Averaged over all queries of the tile: this page keeps attention by query for the blocks in bold.";
    all("#blocks button").forEach((button, index) => button.setAttribute("aria-checked", index === state.block));
    markChosen();
    const name = `block-${state.block}`;
    if (byQuery && !weights.has(name)) {
      loadWeights(name, tiles * attention.heads * queries.count).then(draw, fail);
    }
    draw();
  }

  function chooseHead(head) {
    state.head = Math.min(Math.max(head, -1), attention.heads - 1);
    markChosen();
    draw();
  }

  function markChosen() {
    all("#heads button").forEach((button, index) => button.setAttribute("aria-pressed", index - 1 === state.head));
    all("#all button").forEach((button, index) => {
      const isChosen = index === state.block * attention.heads + state.head && state.head >= 0;
      button.setAttribute("aria-pressed", isChosen);
    });
    all("#distance circle").forEach((dot, index) => {
      const inBlock = Math.floor(index / attention.heads) === state.block;
      dot.setAttribute("class", inBlock ? (index % attention.heads === state.head ? "on" : "same") : "");
    });
  }

  function addButton(parent, text, label, action) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", label);
    button.addEventListener("click", action);
    parent.append(button);
    return button;
  }

  function buildBlocks() {
    for (let block = 0; block < attention.total; block++) {
      const button = addButton(byId("blocks"), block + 1, `Block ${block + 1}`, () => chooseBlock(block));
      button.setAttribute("role", "radio");
      button.classList.toggle("full", isByQuery(block));
    }
    for (let head = -1; head < attention.heads; head++) {
      const text = head < 0 ? "mean" : `head ${head + 1}`;
      const button = addButton(byId("heads"), text, head < 0 ? "Mean of all heads" : text, () => chooseHead(head));
      const canvas = newCanvas(patchColumns, patchRows);
      canvas.className = "pixels";
      button.prepend(canvas);
    }
  }

  function newCanvas(width, height) {
    return Object.assign(document.createElement("canvas"), { width, height });
  }

  function buildAll() {
    const parent = byId("all"), wide = Math.ceil(patchColumns / means.side), high = Math.ceil(patchRows / means.side);
    const ratio = facts.size[0] / facts.size[1];
    const least = Math.round(Math.min(Math.max(26 * ratio, 26), 60)), most = Math.round(Math.min(Math.max(54 * ratio, 40), 110));
    parent.style.gridTemplateColumns = `26px repeat(${attention.heads}, minmax(${least}px, ${most}px))`;
    const label = (text, name) => parent.append(Object.assign(document.createElement("span"), { textContent: text, className: name }));
    label("", "top");
    for (let head = 0; head < attention.heads; head++) label(head + 1, "top");
    for (let block = 0; block < attention.total; block++) {
      label(block + 1, "");
      for (let head = 0; head < attention.heads; head++) {
        const distance = attention.distance[block][head].toFixed(1);
        const text = `Block ${block + 1}, head ${head + 1}: mean distance ${distance} patches`;
        const button = addButton(parent, "", text, () => { chooseHead(head); chooseBlock(block); });
        button.title = text;
        button.tabIndex = -1;
        const canvas = newCanvas(columns * wide, rows * high);
        canvas.className = "pixels";
        canvas.style.aspectRatio = `${facts.size[0]} / ${facts.size[1]}`;
        button.append(canvas);
        drawMean(canvas, block, head, wide, high);
      }
    }
  }

  function drawMean(canvas, block, head, wide, high) {
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    const maps = [...Array(mainTiles).keys()].map((tile) => meanAttention(block, head, tile));
    const ranges = maps.map(rangeOf);
    const level = rootLevel([Math.min(...ranges.map((range) => range[0])), Math.max(...ranges.map((range) => range[1]))]);
    maps.forEach((map, tile) => {
      for (let k = 0; k < map.length; k++) {
        const x = (tile % columns) * wide + (k % wide), y = Math.floor(tile / columns) * high + Math.floor(k / wide);
        setPixel(image.data, y * canvas.width + x, tables.inferno, level(map[k]));
      }
    });
    context.putImageData(image, 0, 0);
  }

  function buildDistance() {
    const svg = byId("distance"), isNarrow = innerWidth <= 720;
    const width = isNarrow ? 360 : 720, height = isNarrow ? 240 : 300, left = 34, bottom = 30;
    const every = attention.total <= (isNarrow ? 12 : 24) ? 1 : isNarrow && attention.total > 24 ? 8 : 4;
    const most = Math.ceil(Math.max(...attention.distance.flat(), 1) / 2) * 2;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const x = (block) => left + ((block + 0.5) * (width - left - 8)) / attention.total;
    const y = (value) => height - bottom - (value * (height - bottom - 10)) / most;
    const add = (name, attributes, text = "") => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      node.textContent = text;
      svg.append(node);
      return node;
    };
    for (let part = 0; part <= 4; part++) {
      const value = (most * part) / 4;
      add("line", { x1: left, x2: width - 8, y1: y(value), y2: y(value) });
      add("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value % 1 ? value.toFixed(1) : value);
    }
    for (let block = 0; block < attention.total; block++) {
      if ((block + 1) % every === 0) {
        add("text", { x: x(block), y: height - 12, "text-anchor": "middle" }, block + 1);
      }
    }
    attention.distance.forEach((heads, block) => heads.forEach((value) => add("circle", { cx: x(block), cy: y(value), r: 4 })));
  }

  // Page

  function buildGrid() {
    for (const svg of all("svg.grid")) {
      const add = (x1, y1, x2, y2) => {
        const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
        Object.entries({ x1, y1, x2, y2 }).forEach(([name, value]) => line.setAttribute(name, value));
        svg.append(line);
      };
      for (let x = 1; x < columns; x++) add(x, 0, x, rows);
      for (let y = 1; y < rows; y++) add(0, y, columns, y);
    }
  }

  function enlarge(view) {
    const isLarge = view && !view.classList.contains("large");
    for (const each of all(".view")) {
      each.classList.toggle("large", each === view && isLarge);
      each.querySelector(".title").setAttribute("aria-expanded", each === view && isLarge);
    }
  }

  function fail(error) {
    byId("notice").hidden = false;
    byId("notice").textContent = typeof DecompressionStream === "undefined"
      ? "This browser cannot decompress the data of the page (DecompressionStream is missing): use a newer one."
      : `The data of the page cannot be read: ${error.message}`;
  }

  function buildViews() {
    for (const image of all("img.under")) image.src = byId("photo").src;
    for (const canvas of all(".stage canvas")) {
      const isMain = canvas.closest(".stage").dataset.part === "main";
      canvas.width = isMain ? columns * patchColumns : patchColumns;
      canvas.height = isMain ? rows * patchRows : patchRows;
    }
    for (const legend of all(".legend")) {
      const canvas = legend.querySelector("canvas"), image = new ImageData(256, 1);
      for (let at = 0; at < 256; at++) setPixel(image.data, at, tables[legend.dataset.legend], at / 255);
      canvas.getContext("2d").putImageData(image, 0, 0);
    }
    all(".stage").forEach(listen);
    all(".view").forEach((view) => view.querySelector(".title").addEventListener("click", () => enlarge(view)));
  }

  async function start() {
    buildGrid();
    buildViews();
    document.addEventListener("keydown", onKey);
    byId("pin").addEventListener("click", () => { state.pinned = !state.pinned; draw(); });
    byId("smooth").addEventListener("change", (event) => document.body.classList.toggle("smooth", event.target.checked));
    byId("opacity").addEventListener("input", (event) =>
      byId("views").style.setProperty("--opacity", event.target.value / 100));
    if (matchMedia("screen and (max-width: 720px)").matches) enlarge(all(".view")[0]);
    draw();
    await loadTokens();
    if (attention) {
      await loadWeights("mean", attention.total * attention.heads);
      buildBlocks();
      buildAll();
      buildDistance();
      chooseBlock(state.block);
    }
    draw();
    document.documentElement.dataset.ready = "true";
  }

  // For tests and for the console
  window.sailvit = { facts, state, cosine: (...place) => cosine(indexOf(...place)), attentionOf, meanAttention, moveTo, loadWeights };
  start().catch(fail);
})();

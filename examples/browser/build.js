// Copyright 2026 The SAILViT package authors.
// SPDX-License-Identifier: Apache-2.0
//
// npm run build -- MODEL [FILE]: writes dist/, the page with all that it needs.
// MODEL is a folder with config.json, preprocessor_config.json and onnx/; FILE a file of onnx/, model.onnx by default.

import { cpSync, existsSync, rmSync } from "node:fs";
import { join, resolve } from "node:path";

const PAGE = ["index.html", "tiling.js", "colours.js"];
const SETTINGS = ["config.json", "preprocessor_config.json"];
const RUNTIME = ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"]; // of onnxruntime-web

/** Return source -> name in dist/. */
function filesOf(model, weights) {
  const runtime = "node_modules/onnxruntime-web/dist";
  return {
    ...Object.fromEntries(PAGE.map((name) => [name, name])),
    ...Object.fromEntries(RUNTIME.map((name) => [join(runtime, name), name])),
    ...Object.fromEntries(SETTINGS.map((name) => [join(model, name), join("model", name)])),
    [join(model, "onnx", weights)]: "model/onnx/model.onnx",
    "../raccoon.jpg": "example.jpg",
  };
}

function build(path, weights = "model.onnx") {
  if (!path) throw new Error("expected a model folder: npm run build -- MODEL");
  const model = resolve(process.env.INIT_CWD ?? ".", path); // npm changes the working directory
  const files = filesOf(model, weights);
  const missing = Object.keys(files).find((source) => !existsSync(source));
  if (missing) {
    const advice = "expected an ONNX folder, from sailvit convert --to-layout onnx, and packages, from npm ci";
    throw new Error(`${missing} does not exist: ${advice}`);
  }
  if (existsSync(join(model, "onnx", `${weights}_data`))) {
    const advice = "expected one file: name a smaller one, such as model_quantized.onnx";
    throw new Error(`${weights} of ${model} has its weights in a second file; ${advice}`);
  }
  rmSync("dist", { recursive: true, force: true });
  for (const [source, name] of Object.entries(files)) cpSync(source, join("dist", name));
}

try {
  build(...process.argv.slice(2));
} catch (error) {
  console.error(error.message);
  process.exitCode = 2;
}

// node serve.mjs [--model ../../model.onnx] [--port 8000] [--host 127.0.0.1]
//
// A server for this folder. Any other will do, if it sends these headers.
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { dirname, extname, resolve, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const HEADERS = {
  // Threads of WebAssembly need both of these.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  // The browser itself sees to it that the page talks to no other machine.
  "Content-Security-Policy":
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; connect-src 'self'; " +
    "img-src 'self' blob: data:; worker-src 'self' blob:; base-uri 'none'; form-action 'none'",
  "Cache-Control": "no-cache",
};
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".wasm": "application/wasm",
  ".onnx": "application/octet-stream",
};

const folder = dirname(fileURLToPath(import.meta.url));
const { values } = parseArgs({
  options: {
    model: { type: "string", default: resolve(folder, "model.onnx") },
    port: { type: "string", default: "8000" },
    host: { type: "string", default: "127.0.0.1" },
  },
});

async function answer(request, response) {
  const finish = (code, text) => response.writeHead(code, HEADERS).end(text);
  if (request.method !== "GET" && request.method !== "HEAD") return finish(405, "GET or HEAD");
  let path;
  try {
    path = decodeURIComponent(new URL(request.url, "http://host").pathname);
  } catch {
    return finish(400, "no address");
  }
  const file =
    path === "/model.onnx" ? resolve(values.model) : resolve(folder, "." + (path === "/" ? "/index.html" : path));
  const isOurs = path === "/model.onnx" || file.startsWith(folder + sep);
  const info = isOurs && TYPES[extname(file)] && (await stat(file).catch(() => null));
  if (!info || !info.isFile()) return finish(404, "no such file");
  response.writeHead(200, { ...HEADERS, "Content-Type": TYPES[extname(file)], "Content-Length": info.size });
  if (request.method === "HEAD") return response.end();
  createReadStream(file).on("error", () => response.destroy()).pipe(response);
}

const server = createServer((request, response) => {
  answer(request, response).catch(() => response.destroy());
});
server.on("error", (error) => {
  console.error(error.code === "EADDRINUSE" ? `port ${values.port} is taken: name another by --port` : error.message);
  process.exit(1);
});
server.listen(Number(values.port), values.host, () => {
  console.log(`http://${values.host === "127.0.0.1" ? "localhost" : values.host}:${server.address().port}/`);
});

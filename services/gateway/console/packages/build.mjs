// Builds ../static/vendor from the packages that package-lock.json names: `make console-packages`.
// Two modules without imports, the styles and fonts of formulas, and the licences of all that is in them.

import { cpSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { build } from "esbuild";

const HERE = import.meta.dirname;
const VENDOR = join(HERE, "../static/vendor");
const MODULES = {
  markdown: `export { default as MarkdownIt } from "markdown-it"; export { tex } from "@mdit/plugin-tex";`,
  katex: `export { render } from "katex";`,
};
const OTHER_FONTS = /,url\([^)]*\.(?:woff|ttf)\) format\("(?:woff|truetype)"\)/g;  // every browser that we support reads woff2

/** Writes a module and returns the names of the packages in it. */
async function bundle(name, contents) {
  const { metafile } = await build({ stdin: { contents, resolveDir: HERE }, outfile: join(VENDOR, `${name}.js`),
    bundle: true, minify: true, format: "esm", target: "es2022", legalComments: "none", metafile: true, logLevel: "warning" });
  return Object.keys(metafile.inputs).flatMap((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1] ?? []);
}

function licence(name) {
  const home = join(HERE, "node_modules", name);
  const { version, license } = JSON.parse(readFileSync(join(home, "package.json"), "utf8"));
  const file = readdirSync(home).find((one) => /^licen[cs]e/i.test(one));
  const text = file ? readFileSync(join(home, file), "utf8").trim() : `Its package names the licence ${license} and has no text of it.`;
  return `${name} ${version} (${license})\n\n${text}\n`;
}

rmSync(VENDOR, { recursive: true, force: true });
mkdirSync(join(VENDOR, "fonts"), { recursive: true });
const packages = new Set();
for (const [name, contents] of Object.entries(MODULES)) {
  for (const one of await bundle(name, contents)) packages.add(one);
}
const katex = join(HERE, "node_modules/katex/dist");
writeFileSync(join(VENDOR, "katex.css"), readFileSync(join(katex, "katex.min.css"), "utf8").replace(OTHER_FONTS, ""));
const fonts = readdirSync(join(katex, "fonts")).filter((font) => font.endsWith(".woff2"));
for (const font of fonts) cpSync(join(katex, "fonts", font), join(VENDOR, "fonts", font));
writeFileSync(join(VENDOR, "LICENSES.txt"), [...packages].sort().map(licence).join(`\n${"-".repeat(80)}\n\n`));

"use strict";

// The data of the page, as `save_page` and `encoded` in the Python module write it.

const $ = (id) => document.getElementById(id);
const facts = JSON.parse($("facts").textContent);
const length = facts.tokens.length;
const CODES = 65535;

/** The attention of a head: {offsets, keys, probabilities}. */
async function decoded(layer, head) {
  const packed = Uint8Array.from(atob($(`attention-${layer}-${head}`).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const view = new DataView(await new Response(stream).arrayBuffer());
  const offsets = new Uint32Array(length + 1);
  for (let row = 0; row < length; row++) offsets[row + 1] = offsets[row] + view.getUint16(2 * row, true);
  const count = offsets[length];
  const keys = new Uint16Array(count), probabilities = new Float64Array(count);
  for (let row = 0; row < length; row++) {
    let key = -1;
    for (let i = offsets[row]; i < offsets[row + 1]; i++) {
      key += view.getUint16(2 * (length + i), true);
      keys[i] = key;
      probabilities[i] = (view.getUint16(2 * (length + count + i), true) / CODES) ** 2;
    }
  }
  return { offsets, keys, probabilities };
}

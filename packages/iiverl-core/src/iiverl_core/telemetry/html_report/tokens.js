"use strict";
// The tokens of a response, coloured by a number of each. `telemetry/html_report/token_numbers.py` describes what a sample holds.

const COLOURINGS = {
  "": { name: "nothing" },
  advantage: { name: "advantage", unit: "", below: "worse than the baseline", above: "better" },
  log_prob: { name: "log-prob", unit: "nats", below: "improbable", above: "certain" },
  mismatch: { name: "mismatch", unit: "nats", below: "less probable to the trainer than to the engine", above: "more" },
  trained: { name: "mask", below: "not trained on", above: "trained on" },
};
const SURPRISE = 5; // nats at which a token has the full colour

const bytesOf = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));

// Half-precision floats, little endian.
function floatsOf(text) {
  const bytes = bytesOf(text), view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true), exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });
}

// The tokens of a sample: text, whether each is trained on and, if it is, its numbers.
function tokensOf(sample) {
  const packed = sample.tokens, text = packed.text ?? sample.response + (packed.after ?? "");
  const lengths = bytesOf(packed.lengths), trained = packed.trained ? bytesOf(packed.trained) : null;
  const numbers = {};
  for (const name of ["advantage", "log_prob", "mismatch"]) {
    const values = packed[name];
    if (values !== undefined) numbers[name] = typeof values === "string" ? floatsOf(values) : values;
  }
  let at = 0, next = 0;
  return Array.from(lengths, (length, i) => {
    const token = { text: text.slice(at, (at += length)), trained: trained === null || trained[i] === 1 };
    if (token.trained) {
      for (const [name, values] of Object.entries(numbers)) token[name] = typeof values === "number" ? values : values[next];
      next += 1;
    }
    return token;
  });
}

// From -1, the full colour of what is low, to 1, that of what is high; null for no colour.
function shadeOf(token, colouring, scale) {
  if (colouring === "trained") return token.trained ? 1 : -1;
  const value = token[colouring];
  if (value === undefined || Number.isNaN(value)) return null;
  return Math.max(-1, Math.min(1, colouring === "log_prob" ? value / SURPRISE : value / scale));
}

// The positions of tokens in which a text is found, whatever its case.
function tokensWith(tokens, wanted) {
  const text = tokens.map((token) => token.text).join("").toLowerCase(), found = new Set();
  const ends = [];
  for (const token of tokens) ends.push((ends.at(-1) ?? 0) + token.text.length);
  if (!wanted || text.length !== ends.at(-1)) return found;
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
    tokens.forEach((token, i) => { if (ends[i] > at && ends[i] - token.text.length < at + wanted.length) found.add(i); });
  }
  return found;
}

function drawTokens(sample, colouring, wanted) {
  const tokens = tokensOf(sample), { name, unit, below, above } = COLOURINGS[colouring];
  const values = tokens.map((token) => token[colouring]).filter((value) => value !== undefined && Number.isFinite(value));
  const scale = Math.max(...values.map(Math.abs), colouring === "advantage" ? ADVANTAGE_SCALE : 1e-7);
  const known = colouring === "trained" || values.length > 0;
  const described = element("p", { class: "quiet token-numbers", role: "status" });
  const describe = (index) => {
    const token = tokens[index];
    const parts = token.trained ? ["log_prob", "mismatch", "advantage"].filter((each) => token[each] !== undefined)
      .map((each) => `${COLOURINGS[each].name} ${number(token[each])}`) : ["not trained on"];
    described.textContent = `token ${index + 1} of ${sample.tokens.total ?? tokens.length} ${JSON.stringify(token.text)}: ${parts.join(", ")}`;
  };
  const found = tokensWith(tokens, wanted);
  const spans = tokens.map((token, i) => {
    const shade = known ? shadeOf(token, colouring, scale) : null;
    const style = shade === null ? null : `--of:var(${shade < 0 ? "--low" : "--high"});--share:${shade ? Math.round(12 + Math.abs(shade) * 58) : 0}%`;
    return element("span", { class: found.has(i) ? "token found" : "token", "data-token": i, style }, token.text);
  });
  let cursor = -1;
  const point = (index) => {
    if (cursor >= 0) spans[cursor].classList.remove("at");
    cursor = Math.max(0, Math.min(spans.length - 1, index));
    spans[cursor].classList.add("at");
    spans[cursor].scrollIntoView({ block: "nearest" });
    describe(cursor);
  };
  const box = element("div", { class: "text tokens", tabindex: 0, role: "group", "aria-label": `Tokens by ${name}; arrow keys move between them`,
    onpointerover: (event) => { const index = event.target.dataset.token; if (index !== undefined) describe(Number(index)); },
    onclick: (event) => { const index = event.target.dataset.token; if (index !== undefined) point(Number(index)); },
    onkeydown: (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) { event.preventDefault(); event.stopPropagation(); point(cursor + by); }
    } }, ...spans);
  const ends = colouring === "trained" ? ["", ""] : colouring === "log_prob" ? [`−${SURPRISE} ${unit} or less:`, ""] : [-scale, scale].map((end) => `${`${number(end, 3)} ${unit}`.trim()}:`);
  const legend = element("div", { class: "legend token-legend" },
    ...(known ? [element("span", { style: "--of:var(--low)" }, `${ends[0]} ${below}`.trim())] : []),
    ...(known && colouring !== "log_prob" ? [element("span", { style: "--of:var(--high)" }, `${ends[1]} ${above}`.trim())] : []),
    ...(known ? [] : [element("span", { class: "unknown" }, `The ${name} of these tokens is not recorded.`)]));
  const cut = sample.tokens.total ? element("p", { class: "quiet" }, `The first ${tokens.length} of ${sample.tokens.total} tokens.`) : null;
  return [legend, box, described, cut].filter(Boolean);
}

// One row of attention under every mode. `row` is pure; the rest draws it. Tests hold `row` to tritonattn.

// Factors of q . k, one a key: D the head dim, lengths those of the keys, queryLength that of q, base the trained length.
const MODES = {
  sqrt_dim: ({ D }) => 1 / Math.sqrt(D),
  dim: ({ D }) => 1 / D,
  none: () => 1,
  key_count: ({ n }) => 1 / n,
  sqrt_key_count: ({ n }) => 1 / Math.sqrt(n),
  key_norm_sum: ({ sum }) => 1 / sum,
  key_norm_mean: ({ n, sum }) => n / sum,
  key_norm_rms: ({ n, squares }) => Math.sqrt(n / squares),
  key_norm_max: ({ largest }) => 1 / largest,
  key_norm_l2: ({ squares }) => 1 / Math.sqrt(squares),
  log_key_count: ({ n, D, base }) => Math.log(n) / Math.log(base) / Math.sqrt(D),
  log_power: ({ n, D, base }) => Math.sqrt(Math.log(n) / Math.log(base) / D),
  qwen_logn: ({ n, D, base }) => Math.max(1, Math.log(n) / Math.log(base)) / Math.sqrt(D),
  llama4: ({ n, D }) => (1 + 0.1 * Math.log(Math.floor(n / 8192) + 1)) / Math.sqrt(D),
  ministral3: ({ n, D }) => (1 + 0.1 * Math.log(1 + Math.floor((n - 1) / 16384))) / Math.sqrt(D),
  inkling: ({ n, D }) => (1 + 0.1 * Math.log(Math.max(n / 128000, 1))) / Math.sqrt(D),
  inkling2: ({ n, D, queryLength }, length) =>
    MODES.inkling({ n, D }) * Math.min(1, Math.sqrt(512) / queryLength) * Math.min(1, Math.sqrt(512) / length),
  beam: ({ n, D }) => (1 + n / 2048) ** 0.1 / Math.sqrt(D),
  cosine: ({ D, queryLength }, length) => Math.sqrt(D) / (queryLength * length),
  ssmax: ({ n, D, s }) => (s * Math.log(n)) / Math.sqrt(D),
};

// Uniform numbers in (0, 1) from a seed: mulberry32.
function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
}

// The length of q, and of each key its length and q . k, for vectors of D standard normal components, keys then
// stretched by exp(spread * normal). They are drawn as such: q . k / ||q|| is one component of k, and the squares of the
// other D - 1 add up to a chi-square number, a normal's square and logarithms of uniform numbers.
function draw({ n, D, spread, seed }) {
  const uniform = uniforms(seed);
  const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  const squaresOf = (pairs) => {
    let product = 1;
    for (let i = 0; i < pairs; i++) product *= uniform();
    return -2 * Math.log(product);
  };
  const queryLength = Math.sqrt(squaresOf(D / 2));
  const dots = new Float64Array(n);
  const lengths = new Float64Array(n);
  for (let j = 0; j < n; j++) {
    const along = normal();
    const stretch = Math.exp(spread * normal());
    dots[j] = queryLength * along * stretch;
    lengths[j] = Math.sqrt(along ** 2 + normal() ** 2 + squaresOf(D / 2 - 1)) * stretch;
  }
  return { D, queryLength, dots, lengths };
}

// Probabilities, entropy / ln n, largest logit and gradient of each mode.
function row({ D, queryLength, dots, lengths }, { base, s }) {
  const n = dots.length;
  const facts = { n, D, base, s, queryLength, sum: 0, squares: 0, largest: 0 };
  for (const length of lengths) {
    facts.sum += length;
    facts.squares += length * length;
    facts.largest = Math.max(facts.largest, length);
  }
  return Object.fromEntries(Object.entries(MODES).map(([name, factorOf]) => [name, rowOf(factorOf)]));

  function rowOf(factorOf) {
    const factors = lengths.map((length) => factorOf(facts, length));
    const p = dots.map((dot, j) => dot * factors[j]);
    let maxLogit = -Infinity;
    for (const logit of p) maxLogit = Math.max(maxLogit, logit);
    let total = 0;
    for (let j = 0; j < n; j++) total += p[j] = Math.exp(p[j] - maxLogit);
    let [entropy, squares, gradient] = [0, 0, 0];
    for (let j = 0; j < n; j++) {
      p[j] /= total;
      entropy -= p[j] > 0 ? p[j] * Math.log(p[j]) : 0;
      squares += p[j] ** 2;
    }
    // Column j of J diag(factor): p_i (delta_ij - p_j) factor_j.
    for (let j = 0; j < n; j++) gradient += (factors[j] * p[j]) ** 2 * ((1 - p[j]) ** 2 + squares - p[j] ** 2);
    return { p, relativeEntropy: entropy / Math.log(n), maxLogit, gradient: Math.sqrt(gradient) };
  }
}

const powersOfTwo = (first, last) => Array.from({ length: last - first + 1 }, (_, i) => 2 ** (first + i));
const SLIDERS = {
  n: { label: "keys n", values: powersOfTwo(1, 17), start: 32 },
  D: { label: "head dim D", values: powersOfTwo(4, 8), start: 64 },
  base: { label: "trained length", values: powersOfTwo(4, 17), start: 512 },
  s: { label: "s of ssmax", values: [0.05, 0.1, 0.16, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 1.5, 2], start: 0.16 },
  spread: { label: "spread of ln ‖k‖", values: [0, 0.25, 0.5, 0.75, 1, 1.5, 2], start: 0 },
  seed: { label: "draw", values: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], start: 0 },
};
const BARS = 32;

function card(name, { p, relativeEntropy, maxLogit, gradient }) {
  const top = p.slice().sort().slice(-BARS).reverse();
  const width = 160 / Math.max(top.length, 8);
  const bars = [...top]
    .map((x, i) => {
      const height = (60 * x) / top[0];
      return `<rect x="${i * width}" y="${60 - height}" width="${width * 0.8}" height="${height}"></rect>`;
    })
    .join("");
  return `<figure><figcaption><code>${name}</code></figcaption>
    <svg viewBox="0 0 160 60" role="img" aria-label="probabilities of ${name}">${bars}</svg>
    <dl><dt>largest p</dt><dd>${top[0].toPrecision(3)}</dd><dt>entropy / ln n</dt><dd>${relativeEntropy.toFixed(3)}</dd>
    <dt>largest logit</dt><dd>${maxLogit.toPrecision(3)}</dd>
    <dt>gradient</dt><dd>${gradient.toExponential(1)}</dd></dl></figure>`;
}

function start(root) {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const chosen = Object.fromEntries(Object.entries(SLIDERS).map(([name, { start }]) => [name, start]));
  for (const name of Object.keys(chosen)) {
    const value = Number(wanted.get(name));
    if (wanted.has(name) && SLIDERS[name].values.includes(value)) chosen[name] = value;
  }
  const controls = Object.entries(SLIDERS).map(([name, { label, values }]) => {
    const at = values.indexOf(chosen[name]);
    return `<label>${label}: <output id="value-${name}"></output>
      <input type="range" data-name="${name}" min="0" max="${values.length - 1}" value="${at}"></label>`;
  });
  root.innerHTML = `<div class="controls">${controls.join("")}</div><div class="cards"></div>`;
  const cards = root.querySelector(".cards");
  const show = () => {
    const found = row(draw(chosen), chosen);
    for (const name of Object.keys(SLIDERS))
      root.querySelector(`#value-${name}`).textContent = chosen[name].toLocaleString("en");
    cards.innerHTML = Object.entries(found).map(([name, one]) => card(name, one)).join("");
    history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
  };
  root.addEventListener("input", ({ target }) => {
    chosen[target.dataset.name] = SLIDERS[target.dataset.name].values[target.value];
    show();
  });
  show();
}

if (typeof document !== "undefined") start(document.getElementById("playground-row"));
if (typeof module !== "undefined") module.exports = { MODES, draw, row };

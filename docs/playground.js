// One row of attention under every mode. `keys` and `row` are pure; the rest draws. Tests hold `row` to tritonattn.

// Factors of q . k as functions of a key's norm: D the head dim, L the trained length, queryNorm the norm of q, squares the
// sum of the keys' squared norms.
const modesOf = ({ n, D, L, s, queryNorm, sum, squares, largest }) => ({
  // generated: playground
  sqrt_dim: (norm) => 1 / Math.sqrt(D),
  dim: (norm) => 1 / D,
  none: (norm) => 1,
  key_count: (norm) => 1 / n,
  sqrt_key_count: (norm) => 1 / Math.sqrt(n),
  log_key_count: (norm) => Math.log(n) / Math.log(L) / Math.sqrt(D),
  log_power: (norm) => (Math.log(n) / Math.log(L)) ** (1 / 2) / Math.sqrt(D),
  key_norm_sum: (norm) => 1 / sum,
  key_norm_mean: (norm) => 1 / (sum / n),
  key_norm_rms: (norm) => 1 / Math.sqrt((squares / n)),
  key_norm_max: (norm) => 1 / largest,
  key_norm_l2: (norm) => 1 / Math.sqrt(squares),
  qwen_logn: (norm) => Math.max(1, Math.log(n) / Math.log(L)) / Math.sqrt(D),
  grok2: (norm) => Math.max(1, Math.log(n-1) / Math.log(L)) / Math.sqrt(D),
  llama4: (norm) => (1 + 0.1 * Math.log(Math.floor(n / 8192) + 1)) / Math.sqrt(D),
  ministral3: (norm) => (1 + 0.1 * Math.log(1 + Math.floor((n-1) / 16384))) / Math.sqrt(D),
  inkling: (norm) => (1 + 0.1 * Math.log(Math.max(n / 128000, 1))) / Math.sqrt(D),
  inkling2: (norm) => Math.min(1, (Math.sqrt(512)) / queryNorm) * Math.min(1, (Math.sqrt(512)) / norm) * (1 + 0.1 * Math.log(Math.max(n / 128000, 1))) / Math.sqrt(D),
  beam: (norm) => (1 + n / 2048) ** 0.1 / Math.sqrt(D),
  cosine: (norm) => Math.sqrt(D) / (queryNorm * norm),
  // end
  ssmax: () => (s * Math.log(n)) / Math.sqrt(D),
});

// Uniform numbers of (0, 1) from a seed: mulberry32.
function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
}

// The norm of q, and of each key its product with q and its norm; the first keys do not depend on n. No vector is
// made: with z and c2 drawn from a normal and a chi-squared distribution of D - 1 degrees,
// q . k = stretch ||q|| z and ||k||^2 = stretch^2 (z^2 + c2), as of D standard normal components times stretch.
function keys({ n, D, spread, seed }) {
  const uniform = uniforms(seed);
  const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  const chiSquared = (degrees) => {
    const d = degrees / 2 - 1 / 3; // twice a gamma number of degrees / 2: Marsaglia and Tsang, 2000
    for (;;) {
      const x = normal();
      const v = (1 + x / Math.sqrt(9 * d)) ** 3;
      if (v > 0 && Math.log(uniform()) < x * x / 2 + d * (1 - v + Math.log(v))) return 2 * d * v;
    }
  };
  const queryNorm = Math.sqrt(chiSquared(D));
  const dots = new Float64Array(n);
  const norms = new Float64Array(n);
  for (let j = 0; j < n; j++) {
    const z = normal();
    const norm = Math.sqrt(z * z + chiSquared(D - 1));
    const stretch = Math.exp(spread * normal());
    dots[j] = stretch * queryNorm * z;
    norms[j] = stretch * norm;
  }
  return { queryNorm, dots, norms };
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const largest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

// Probabilities, entropy / ln n, largest logit and gradient of each mode. L and s are settings of modes.
function row({ queryNorm, dots, norms }, { D, L, s }) {
  const squares = sum(norms.map((x) => x * x));
  const facts = { n: dots.length, D, L, s, queryNorm, sum: sum(norms), squares, largest: largest(norms) };
  return Object.fromEntries(
    Object.entries(modesOf(facts)).map(([name, factorOf]) => {
      const factors = norms.map((norm) => factorOf(norm));
      const logits = dots.map((dot, j) => dot * factors[j]);
      const maxLogit = largest(logits);
      const weights = logits.map((z) => Math.exp(z - maxLogit));
      const total = sum(weights);
      const p = weights.map((w) => w / total);
      const entropy = -sum(p.map((x) => (x > 0 ? x * Math.log(x) : 0)));
      const ofAll = sum(p.map((x) => x * x));
      // Column j of J diag(factor): p_i (delta_ij - p_j) factor_j.
      const columns = p.map((x, j) => factors[j] ** 2 * x * x * ((1 - x) ** 2 + ofAll - x * x));
      return [name, { p, relativeEntropy: entropy / Math.log(facts.n), maxLogit, gradient: Math.sqrt(sum(columns)) }];
    }),
  );
}

// The `count` largest values, in order.
function leaders(values, count) {
  const found = [];
  for (const value of values) {
    if (found.length === count && value <= found[count - 1]) continue;
    let at = found.length;
    while (at > 0 && found[at - 1] < value) at--;
    found.splice(at, 0, value);
    found.length = Math.min(found.length, count);
  }
  return found;
}

const powers = (first, last) => Array.from({ length: last - first + 1 }, (_, i) => 2 ** (first + i));
const SLIDERS = {
  n: { label: "keys n", values: powers(1, 17), start: 1024 },
  D: { label: "head dim D", values: powers(4, 8), start: 64 },
  L: { label: "trained length L", values: [Math.E, ...powers(3, 17)], start: 64 },
  s: { label: "s of ssmax", values: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1], start: 0.4 },
  spread: { label: "spread of ln ‖k‖", values: [0, 0.25, 0.5, 0.75, 1, 1.5, 2], start: 0 },
  seed: { label: "draw", values: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], start: 0 },
};
const BARS = 32;
const [DECADES, HEIGHT] = [6, 60]; // from 1 at the top of every card down to 10^-6
const GRID = Array.from({ length: DECADES + 1 }, (_, i) => 10 ** -i);

// The height of a bar: one scale for every card and every n.
const heightOf = (p) => Math.max(0, HEIGHT * (1 + Math.log10(p) / DECADES));

const shown = (value) => (value === Math.E ? "e" : value.toLocaleString("en-US"));

function card(name, { p, relativeEntropy, maxLogit, gradient }) {
  const most = leaders(p, BARS);
  const width = 160 / Math.max(most.length, 8);
  const line = (height, kind) => `<path class="${kind}" d="M0 ${HEIGHT - height}H160"></path>`;
  const grid = GRID.map((x) => line(heightOf(x), "grid")).join("") + line(heightOf(1 / p.length), "uniform");
  const bars = most
    .map((x, i) => {
      const height = heightOf(x);
      return `<rect x="${i * width}" y="${HEIGHT - height}" width="${width * 0.8}" height="${height}"></rect>`;
    })
    .join("");
  return `<figure><figcaption><code>${name}</code></figcaption>
    <svg viewBox="0 0 160 ${HEIGHT}" role="img" aria-label="probabilities of ${name}">${bars}${grid}</svg>
    <dl><dt>largest p</dt><dd>${most[0].toPrecision(3)}</dd><dt>entropy / ln n</dt><dd>${relativeEntropy.toFixed(3)}</dd>
    <dt>largest logit</dt><dd>${maxLogit.toPrecision(3)}</dd>
    <dt>gradient</dt><dd>${gradient.toExponential(1)}</dd></dl></figure>`;
}

function start(root) {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const chosen = {};
  for (const [name, { values, start }] of Object.entries(SLIDERS)) {
    chosen[name] = values.find((value) => String(value) === wanted.get(name)) ?? start;
  }
  const controls = Object.entries(SLIDERS).map(([name, { label, values }]) => {
    const at = values.indexOf(chosen[name]);
    return `<label>${label}: <output id="value-${name}"></output>
      <input type="range" data-name="${name}" min="0" max="${values.length - 1}" value="${at}"></label>`;
  });
  root.innerHTML = `<div class="controls">${controls.join("")}</div><div class="cards"></div>`;
  const cards = root.querySelector(".cards");
  const draw = () => {
    const found = row(keys(chosen), chosen);
    for (const name of Object.keys(SLIDERS)) root.querySelector(`#value-${name}`).textContent = shown(chosen[name]);
    cards.innerHTML = Object.entries(found).map(([name, one]) => card(name, one)).join("");
    history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
  };
  root.addEventListener("input", ({ target }) => {
    chosen[target.dataset.name] = SLIDERS[target.dataset.name].values[target.value];
    draw();
  });
  draw();
}

if (typeof document !== "undefined") start(document.getElementById("playground-row"));
if (typeof module !== "undefined") module.exports = { keys, row, leaders, card };

// One row of attention under every mode. `row` is pure; the rest draws it. Tests hold `row` to tritonattn.

// Factors of q . k, one a key: D the head dim, lengths those of the keys, queryLength that of q.
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
  log_key_count: ({ n, D }) => Math.log(n) / Math.sqrt(D),
  log_power: ({ n, D }) => Math.sqrt(Math.log(n) / D),
  qwen_logn: ({ n, D }) => Math.max(1, Math.log(n) / Math.log(8192)) / Math.sqrt(D),
  llama4: ({ n, D }) => (1 + 0.1 * Math.log(Math.floor(n / 8192) + 1)) / Math.sqrt(D),
  ministral3: ({ n, D }) => (1 + 0.1 * Math.log(1 + Math.floor((n - 1) / 16384))) / Math.sqrt(D),
  inkling: ({ n, D }) => (1 + 0.1 * Math.log(Math.max(n / 128000, 1))) / Math.sqrt(D),
  inkling2: ({ n, D, queryLength }, length) =>
    MODES.inkling({ n, D }) * Math.min(1, Math.sqrt(512) / queryLength) * Math.min(1, Math.sqrt(512) / length),
  beam: ({ n, D }) => (1 + n / 2048) ** 0.1 / Math.sqrt(D),
  cosine: ({ D, queryLength }, length) => Math.sqrt(D) / (queryLength * length),
};

// Standard normal numbers from a seed: mulberry32, then Box and Muller.
function normals(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}

// q [D] and k [n][D]: keys of ln-length spread `spread` around that of standard normal components.
function operands({ n, D, spread, seed }) {
  const normal = normals(seed);
  const q = Array.from({ length: D }, normal);
  const k = Array.from({ length: n }, () => {
    const key = Array.from({ length: D }, normal);
    const stretch = Math.exp(spread * normal());
    return key.map((x) => x * stretch);
  });
  return { q, k };
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const norm = (vector) => Math.sqrt(sum(vector.map((x) => x * x)));

// Probabilities, entropy / ln n, largest logit and gradient of each mode.
function row(q, k) {
  const dots = k.map((key) => sum(key.map((x, i) => x * q[i])));
  const lengths = k.map(norm);
  const facts = {
    n: k.length,
    D: q.length,
    queryLength: norm(q),
    sum: sum(lengths),
    squares: sum(lengths.map((x) => x * x)),
    largest: Math.max(...lengths),
  };
  return Object.fromEntries(
    Object.entries(MODES).map(([name, factorOf]) => {
      const factors = lengths.map((length) => factorOf(facts, length));
      const logits = dots.map((dot, j) => dot * factors[j]);
      const maxLogit = Math.max(...logits);
      const weights = logits.map((z) => Math.exp(z - maxLogit));
      const total = sum(weights);
      const p = weights.map((w) => w / total);
      const entropy = -sum(p.map((x) => (x > 0 ? x * Math.log(x) : 0)));
      const squares = sum(p.map((x) => x * x));
      // Column j of J diag(factor): p_i (delta_ij - p_j) factor_j.
      const columns = p.map((x, j) => factors[j] ** 2 * x * x * ((1 - x) ** 2 + squares - x * x));
      return [name, { p, relativeEntropy: entropy / Math.log(k.length), maxLogit, gradient: Math.sqrt(sum(columns)) }];
    }),
  );
}

const SLIDERS = {
  n: { label: "keys n", values: [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096] },
  D: { label: "head dim D", values: [16, 32, 64, 128, 256] },
  spread: { label: "spread of ln ‖k‖", values: [0, 0.25, 0.5, 0.75, 1, 1.5, 2] },
  seed: { label: "draw", values: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] },
};
const BARS = 32;

function card(name, { p, relativeEntropy, maxLogit, gradient }) {
  const top = [...p].sort((a, b) => b - a).slice(0, BARS);
  const width = 160 / Math.max(top.length, 8);
  const bars = top
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
  const chosen = { n: 32, D: 64, spread: 0, seed: 0 };
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
  const draw = () => {
    const { q, k } = operands(chosen);
    const found = row(q, k);
    for (const name of Object.keys(SLIDERS)) root.querySelector(`#value-${name}`).textContent = chosen[name];
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
if (typeof module !== "undefined") module.exports = { MODES, operands, row };

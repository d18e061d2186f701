// The sections of the page, from the data that the trainer has put into it. Texts become text nodes, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, several = runs.length > 1;

const section = (id) => {
  const found = document.getElementById(id);
  found.hidden = false;
  return found;
};
const unique = (values) => [...new Set(values)];
const count = (number) => number.toLocaleString("en");
const fixed = (value) => (known(value) ? value.toFixed(4) : "–");
const signed = (value) => (known(value) ? (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(4) : "–");
const lowerIsBetter = (metric) => runs.some((run) => run.lower_metrics.includes(metric));
// The class of a difference: green if the metric became better, red if worse.
const side = (delta, lower) => (known(delta) && Math.abs(delta) >= 5e-5 ? (delta > 0 !== lower ? "better" : "worse") : "");
const at = (run, step) => run.evaluations.find((evaluation) => evaluation.step === step)?.scores ?? {};
const before = (run) => at(run, 0);
const after = (run) => (run.selected > 0 ? at(run, run.selected) : {});
// A long name may be broken after its underscores, dots and slashes.
const breakable = (name) => name.split(/(?<=[_./])/).flatMap((part, n) => (n > 0 ? [html("wbr"), part] : [part]));

// `scifact_cosine_ndcg@10` → the set scifact and its metric.
function metricOf(run, name) {
  const names = run.sets.map((set) => set.name).filter((set) => name.startsWith(`${set}_`));
  const set = names.reduce((longest, set) => (set.length > longest.length ? set : longest), "");
  return { set, metric: set === "" ? name : name.slice(set.length + 1) };
}

const isMain = (run, name) =>
  name === run.metric || name.endsWith(`_${run.metric}`) || run.sets.some((set) => name === `${set.name}_${set.primary}`);

function duration(seconds) {
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function amount(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(2)} G`;
  if (number >= 1e6) return `${(number / 1e6).toFixed(2)} M`;
  return count(number);
}

function bytes(number) {
  if (number >= 2 ** 30) return `${(number / 2 ** 30).toFixed(1)} GiB`;
  return `${(number / 2 ** 20).toFixed(0)} MiB`;
}

function table(label, head, rows) {
  const all = html("table", {}, html("thead", {}, ...head), html("tbody", {}, ...rows));
  return html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, all);
}

function runHeadings(first, columns) {
  const spanned = columns > 1 ? { colspan: columns, scope: "colgroup" } : { scope: "col" };
  return html("tr", {}, first, ...runs.map((run) => html("th", { class: "run", ...spanned }, swatch(run), run.name)));
}

// The name of a run, with its values of the keys that differ if there are few: `zeta (rank 8)`.
function label(run) {
  const different = data.differences;
  if (different.length === 0 || different.length > 2) return run.name;
  const values = different.map(({ key, values }) => `${key.split(".").at(-1)} ${values[runs.indexOf(run)] ?? "–"}`);
  return `${run.name} (${values.join(", ")})`;
}

function swatch(run) {
  return several ? html("span", { class: "swatch", style: `background: var(--c${runs.indexOf(run) % COLORS})`, "aria-hidden": "true" }) : "";
}

// What is known about a run beside its metrics: [name, value], without what is not known.
function facts(run) {
  const { version, started, starts, host, system, processor, threads, gpus, ranks, parameters, trained } = run.facts ?? {};
  const share = parameters > 0 ? ` (${(trained / parameters * 100).toPrecision(3)} %)` : "";
  const gpu = unique(gpus ?? []).map((model) => `${gpus.filter((other) => other === model).length} × ${model}`).join(", ");
  const resumed = starts > 1 ? `, resumed ${starts - 1} ${starts === 2 ? "time" : "times"}` : "";
  return [
    ["model", run.model],
    ["data", Object.keys(run.losses).join(", ")],
    ["started", started > 0 ? new Date(started * 1000).toISOString().slice(0, 16).replace("T", " ") + " UTC" + resumed : ""],
    ["wall time", run.wall_seconds > 0 ? duration(run.wall_seconds) : ""],
    ["time in steps", run.totals.seconds > 0 ? duration(run.totals.seconds) : ""],
    ["parameters", parameters > 0 ? `${amount(trained)} trained of ${amount(parameters)}${share}` : ""],
    ["ranks", ranks > 0 ? count(ranks) : ""],
    ["GPUs", gpu],
    ["processor", processor ? `${processor}, ${threads} ${threads === 1 ? "thread" : "threads"}${ranks > 1 ? " a rank" : ""}` : ""],
    ["peak memory", run.peak_memory > 0 ? bytes(run.peak_memory) : ""],
    ["peak GPU memory", run.peak_gpu_memory > 0 ? bytes(run.peak_gpu_memory) : ""],
    ["host", host ? [host, system].filter(Boolean).join(", ") : ""],
    ["trainer", version],
    ["folder", run.folder],
  ].filter(([, value]) => value);
}

function heading() {
  const title = several ? `${runs.length} runs` : runs[0].name;
  document.title = runs.map((run) => run.name).join(" · ");
  document.getElementById("title").textContent = title;
  document.getElementById("about").textContent = several
    ? runs.map(label).join(" · ")
    : [runs[0].model, Object.keys(runs[0].losses).join(", "), `model after step ${count(runs[0].selected)}`].filter(Boolean).join(" — ");
}

function warnings() {
  for (const run of runs) {
    const delta = run.after - run.before;
    if (!known(run.before) || !known(run.after) || side(delta, run.lower_is_better) !== "worse") continue;
    const best = run.best && run.best.step !== run.selected && side(run.best.value - run.before, run.lower_is_better) === "better"
      ? ` The best evaluation, ${fixed(run.best.value)} after step ${count(run.best.step)}, is better than the base: evaluation.load_best takes it.`
      : "";
    const text = `The trained model is worse than the base: ${run.metric} fell from ${fixed(run.before)} to ${fixed(run.after)}.`
      .replace("fell", run.lower_is_better ? "rose" : "fell");
    document.getElementById("summary").before(html("p", { class: "warning", role: "note" }, several ? `${run.name}: ` : "", text + best));
  }
}

function tile(name, value, note = "", kind = "") {
  return html("div", { class: "tile" }, html("span", {}, name), html("strong", kind ? { class: kind } : {}, value), " ", html("small", {}, note));
}

function summary() {
  if (several) return;
  const [run] = runs, tiles = [];
  if (known(run.after)) {
    const note = known(run.before) ? `${fixed(run.before)} before, ${signed(run.after - run.before)}` : "";
    tiles.push(tile(run.metric, fixed(run.after), note, side(run.after - run.before, run.lower_is_better)));
  }
  if (run.best !== null) {
    const value = `${fixed(run.best.value)}${run.best.step === run.selected ? ", in model/" : `; model/ has step ${count(run.selected)}`}`;
    tiles.push(tile("best step", count(run.best.step), value));
  }
  const { steps, logged, tokens, seconds } = run.totals;
  tiles.push(tile("steps", count(steps)));
  if (run.loss !== null) {
    const over = run.loss.steps > 1 ? `mean of ${run.loss.steps} steps; ` : "";
    tiles.push(tile("loss", shown(run.loss.last), `${over}${shown(run.loss.first)} at the start`));
  }
  const part = logged < steps ? [`in ${count(logged)} logged steps`] : [];
  tiles.push(tile("tokens", amount(tokens), ...part));
  if (seconds > 0) tiles.push(tile("speed", `${amount(Math.round(tokens / seconds))}/s`, "tokens per second in steps"));
  if (run.wall_seconds > 0) tiles.push(tile("wall time", duration(run.wall_seconds), `${duration(seconds)} in steps`));
  document.getElementById("summary").append(...tiles);
}

// Several runs: what differs between them, and what came out.
function comparison() {
  if (!several) return;
  const place = section("runs");
  const row = (name, values, kinds = []) =>
    html("tr", {}, html("th", { scope: "row" }, ...breakable(name)), ...values.map((value, n) => html("td", kinds[n] ? { class: kinds[n] } : {}, value)));
  const metrics = unique(runs.map((run) => run.metric));
  const rows = [
    ...data.differences.map(({ key, values }) => row(key, values.map((value) => value ?? "–"))),
    ...metrics.flatMap((metric) => {
      const of = (run) => run.metric === metric;
      const delta = (run) => (known(run.after) && known(run.before) ? run.after - run.before : null);
      return [
        row(metric, runs.map((run) => (of(run) ? fixed(run.after) : "–"))),
        row(`${metric}, Δ to the base`, runs.map((run) => (of(run) ? signed(delta(run)) : "–")), runs.map((run) => side(delta(run), run.lower_is_better))),
        row("best step", runs.map((run) => (of(run) && run.best ? `${count(run.best.step)} (${fixed(run.best.value)})` : "–"))),
      ];
    }),
    row("loss at the end", runs.map((run) => (run.loss ? shown(run.loss.last) : "–"))),
    row("steps", runs.map((run) => count(run.totals.steps))),
    row("tokens per second", runs.map((run) => (run.totals.seconds > 0 ? amount(Math.round(run.totals.tokens / run.totals.seconds)) : "–"))),
  ];
  place.append(table("Runs", [runHeadings(html("td"), 1)], rows));
  if (data.differences.length === 0) place.append(html("p", { class: "soft" }, "The configurations do not differ."));
}

function metricTable(names) {
  const head = html("tr", {}, html("th", { scope: "col" }, "metric"), ...runs.flatMap(() => ["base", "tuned", "Δ"].map((title) => html("th", { scope: "col" }, title))));
  const rows = names.map((name) => {
    const row = html("tr", {}, html("th", { scope: "row" }, ...breakable(name), ...(lowerIsBetter(name) ? [html("small", {}, " lower is better")] : [])));
    for (const run of runs) {
      const [base, tuned] = [before(run)[name], after(run)[name]];
      const delta = known(base) && known(tuned) ? tuned - base : null;
      row.append(html("td", {}, fixed(base)), html("td", {}, fixed(tuned)), html("td", { class: side(delta, lowerIsBetter(name)) }, signed(delta)));
    }
    return row;
  });
  return table("Metrics before and after", several ? [runHeadings(html("td"), 3), head] : [head], rows);
}

function gain() {
  const names = unique(runs.flatMap((run) => [...Object.keys(before(run)), ...Object.keys(after(run))]));
  if (names.length === 0) return;
  const main = names.filter((name) => runs.some((run) => isMain(run, name)));
  const place = section("gain");
  if (main.length > 0) place.append(metricTable(main));
  if (main.length < names.length) {
    place.append(html("details", main.length > 0 ? {} : { open: "" }, html("summary", {}, `all ${names.length} metrics`), metricTable(names)));
  }
}

// One run: a colour for each line. Several: a colour for each run, dashes for its lines.
function styled(run, line) {
  const dash = several ? line % DASHES.length : Math.floor(line / COLORS) % DASHES.length;
  return { color: several ? runs.indexOf(run) : line, dash };
}

const named = (run, name) => (several && name ? `${run.name} · ${name}` : several ? label(run) : name);

// The best step of each run, for charts to mark.
const marks = runs.filter((run) => run.best !== null)
  .map((run) => ({ step: run.best.step, label: several ? "" : "best", color: several ? runs.indexOf(run) : null }));

function evaluation() {
  const found = new Map(), main = [];
  for (const run of runs) {
    const names = unique(run.evaluations.flatMap((evaluation) => Object.keys(evaluation.scores)));
    const sets = unique(names.map((name) => metricOf(run, name).set));
    for (const name of names) {
      const { set, metric } = metricOf(run, name);
      const series = {
        name: named(run, set) || name,
        x: run.evaluations.map((evaluation) => evaluation.step),
        y: run.evaluations.map((evaluation) => evaluation.scores[name] ?? null),
        ...styled(run, sets.indexOf(set)),
      };
      found.set(metric, [...(found.get(metric) ?? []), series]);
      if (isMain(run, name) && !main.includes(metric)) main.push(metric);
    }
  }
  if (found.size === 0) return;
  const place = section("evaluation");
  const large = html("div", { class: "grid" });
  place.append(large);
  for (const metric of main) new Chart(large, metric, found.get(metric), { whole: true, marks });
  const rest = [...found.keys()].filter((metric) => !main.includes(metric));
  if (rest.length === 0) return;
  const small = html("div", { class: "grid small" });
  place.append(html("details", main.length > 0 ? {} : { open: "" }, html("summary", {}, `${rest.length} more metrics`), small));
  for (const metric of rest) new Chart(small, metric, found.get(metric), { whole: true, height: 150, marks });
}

function training() {
  const drawn = runs.filter((run) => run.steps.step.length > 0);
  if (drawn.length === 0) return;
  const place = section("training");
  const grid = html("div", { class: "grid" });
  const charts = [];
  const add = (title, series, options = {}) => {
    if (series.length > 0) charts.push(new Chart(grid, title, series, { marks, ...options }));
  };
  const column = (title, key, options) => add(title, drawn.filter((run) => run.steps[key]?.some(known))
    .map((run) => ({ name: label(run), x: run.steps.step, y: run.steps[key], ...styled(run, 0) })), options);
  column("Loss", "loss");
  const parts = drawn.flatMap((run) => Object.entries(run.losses).map(([name, losses], line) => {
    // A step without a row of the data set is no gap.
    const present = losses.map((loss, n) => n).filter((n) => known(losses[n]));
    return { name: named(run, name), x: present.map((n) => run.steps.step[n]), y: present.map((n) => losses[n]), ...styled(run, line) };
  }));
  if (parts.length > drawn.length) add("Loss of each data set", parts);
  column("Gradient norm before clipping", "grad_norm");
  column("Learning rate", "learning_rate", { whole: true });
  column("Tokens per second", "tokens_per_second");
  column("Peak memory", "memory", { whole: true, format: bytes });
  column("Peak GPU memory", "gpu_memory", { whole: true, format: bytes });
  // Most runs have no known positives among their candidates.
  if (drawn.some((run) => run.steps.masked?.some((share) => share > 0))) column("Fraction of candidates masked as known positives", "masked");
  const slider = html("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: "0" });
  const value = html("output", {}, "0");
  slider.addEventListener("input", () => {
    value.textContent = slider.value;
    charts.forEach((chart) => chart.smooth(Number(slider.value)));
  });
  const longest = Math.max(...drawn.map((run) => run.steps.step.length));
  if (longest > 30) place.append(html("div", { class: "controls" }, html("label", {}, "Smoothing ", slider, value)));
  place.append(grid);
  if (longest > 150) {
    slider.value = "0.9";
    slider.dispatchEvent(new Event("input"));
  }
}

// An example after one evaluation.
function example(title, measure, { value, note, candidates }) {
  const scored = candidates.some((candidate) => known(candidate.cosine));
  const items = candidates.map((candidate) => {
    const mark = html("span", { class: "mark" }, candidate.relevant ? "✓" : "");
    if (candidate.relevant) mark.setAttribute("aria-label", "right");
    const cosine = scored ? [html("span", { class: "cosine" }, known(candidate.cosine) ? candidate.cosine.toFixed(3) : "–")] : [];
    return html("li", candidate.relevant ? { class: "relevant" } : {}, ...cosine, mark, html("span", {}, candidate.text));
  });
  const about = [`${measure} ${fixed(value)}`, note].filter(Boolean).join("; ");
  return html("div", {}, html("h4", {}, html("span", {}, title), ` ${about}`), html("ol", scored ? {} : { class: "unscored" }, ...items));
}

function card(run, moved, { before, after }) {
  const delta = after.value - before.value;
  const gain = html("small", { class: side(delta, moved.lower_is_better) }, signed(delta));
  const sides = html("div", { class: "sides" }, example("before", moved.measure, before), example(`after step ${count(run.selected)}`, moved.measure, after));
  return html("details", { class: "example" }, html("summary", {}, gain, html("span", {}, before.text)), sides);
}

function examples() {
  for (const run of runs) {
    for (const moved of run.moved) {
      const place = section("examples");
      place.append(html("h3", {}, swatch(run), several ? `${run.name} · ${moved.set}` : moved.set));
      const { improved, declined } = moved, same = moved.count - improved.count - declined.count;
      place.append(html("p", { class: "soft" },
        `${moved.measure}${moved.lower_is_better ? ", lower is better" : ""}: of ${count(moved.count)} examples ${count(improved.count)} improved, ${count(declined.count)} declined, ${count(same)} stayed the same.`));
      const columns = [["Improved most", improved], ["Declined most", declined]].filter(([, list]) => list.shown.length > 0)
        .map(([title, list]) => {
          const cards = list.shown.map((pair) => card(run, moved, pair));
          // The first one shows what the others hold.
          if (!several) cards[0].open = true;
          return html("div", {}, html("h4", {}, title), ...cards);
        });
      place.append(html("div", { class: "columns" }, ...columns));
    }
  }
}

function about() {
  const rows = runs.map(facts);
  const names = unique(rows.flatMap((row) => row.map(([name]) => name)));
  const place = section("facts");
  if (!several) {
    place.append(html("dl", {}, ...rows[0].flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, ...breakable(value))])));
    return;
  }
  place.querySelector("h2").textContent = "About the runs";
  const of = (row, name) => row.find(([other]) => other === name)?.[1] ?? "–";
  place.append(table("About the runs", [runHeadings(html("td"), 1)],
    names.map((name) => html("tr", {}, html("th", { scope: "row" }, name), ...rows.map((row) => html("td", {}, of(row, name)))))));
}

function configuration() {
  for (const run of runs.filter((run) => run.config !== null)) {
    const place = section("configuration");
    const text = html("pre", { tabindex: "0" }, run.config);
    place.append(html("details", several ? {} : { open: "" }, html("summary", {}, several ? run.name : "config.yaml"), text));
  }
}

[heading, warnings, summary, comparison, gain, evaluation, training, examples, about, configuration].forEach((part) => part());

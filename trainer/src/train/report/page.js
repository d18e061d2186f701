// The page: its sections, from the data that the trainer wrote into it. Texts become text nodes, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, several = runs.length > 1;
const MAIN = ["cosine_ndcg@10", "max_accuracy", "spearman_cosine"];
const section = (id) => {
  const found = document.getElementById(id);
  found.hidden = false;
  return found;
};
const unique = (values) => [...new Set(values)];
const signed = (value) => (known(value) ? (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(4) : "–");
const fixed = (value) => (known(value) ? value.toFixed(4) : "–");
const side = (value) => (known(value) && Math.abs(value) >= 5e-5 ? (value > 0 ? "up" : "down") : "");
const at = (run, step) => run.evaluations.find((evaluation) => evaluation.step === step);
const before = (run) => (at(run, 0) ?? {}).scores ?? {};
const after = (run) => (run.chosen > 0 ? (at(run, run.chosen) ?? {}).scores ?? {} : {});

// `scifact_cosine_ndcg@10` → the set scifact and its metric.
const METRIC = /^(.*)_((?:cosine|dot|manhattan|euclidean|max)_(?:accuracy|precision|recall|ndcg|mrr|map)(?:@\d+)?|(?:pearson|spearman)_[a-z]+)$/;

function metricOf(name) {
  const parts = METRIC.exec(name);
  return parts === null ? { set: "", metric: name } : { set: parts[1], metric: parts[2] };
}

function tile(name, value, note = "", kind = "") {
  return make("div", { class: "tile" }, make("span", {}, name), make("strong", kind ? { class: kind } : {}, value), " ", make("small", {}, note));
}

function duration(seconds) {
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function counted(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(2)} G`;
  if (number >= 1e6) return `${(number / 1e6).toFixed(2)} M`;
  return number.toLocaleString("en");
}

function heading() {
  const title = runs.map((run) => run.name).join(" · ");
  document.title = title;
  document.getElementById("title").textContent = title;
  document.getElementById("about").textContent = several
    ? `${runs.length} runs`
    : [runs[0].model, Object.keys(runs[0].losses).join(", "), `model after step ${runs[0].chosen.toLocaleString("en")}`].filter(Boolean).join(" — ");
}

function summary() {
  for (const run of runs) {
    const name = (what) => (several ? `${run.name}: ${what}` : what);
    const [base, tuned] = [run.deciding.before, run.deciding.after];
    if (known(tuned)) {
      const note = known(base) ? `from ${fixed(base)}, ${signed(tuned - base)}` : "";
      document.getElementById("summary").append(tile(name(run.metric), fixed(tuned), note, side(tuned - base)));
    }
    const loss = run.steps.loss.filter(known);
    const tiles = [tile(name("steps"), run.totals.steps.toLocaleString("en"))];
    if (loss.length > 0) tiles.push(tile(name("loss"), shown(loss[loss.length - 1]), `from ${shown(loss[0])}`));
    if (!several) {
      const { steps, logged, tokens, seconds } = run.totals;
      const part = logged < steps ? [`in the ${logged.toLocaleString("en")} steps that were logged`] : [];
      tiles.push(tile("tokens", counted(tokens), ...part));
      const rate = `${counted(Math.round(tokens / seconds))} tokens/s`;
      if (seconds > 0) tiles.push(tile("time in steps", duration(seconds), [rate, ...part].join(", ")));
    }
    document.getElementById("summary").append(...tiles);
  }
}

function table(names) {
  const head = make("tr", {}, make("th", { scope: "col" }, "metric"));
  const groups = make("tr", {}, make("td"));
  for (const run of runs) {
    groups.append(make("th", { class: "run", colspan: "3", scope: "colgroup" }, run.name));
    head.append(...["base", "tuned", "Δ"].map((title) => make("th", { scope: "col" }, title)));
  }
  const rows = names.map((name) => {
    // A long name may be broken after its underscores.
    const parts = name.split(/(?<=_)/).flatMap((part, n) => (n > 0 ? [make("wbr"), part] : [part]));
    const row = make("tr", {}, make("th", { scope: "row" }, ...parts));
    for (const run of runs) {
      const [base, tuned] = [before(run)[name], after(run)[name]];
      const delta = known(base) && known(tuned) ? tuned - base : null;
      row.append(make("td", {}, fixed(base)), make("td", {}, fixed(tuned)), make("td", { class: side(delta) }, signed(delta)));
    }
    return row;
  });
  const all = make("table", {}, make("thead", {}, ...(several ? [groups, head] : [head])), make("tbody", {}, ...rows));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Metrics before and after" }, all);
}

function gain() {
  const names = unique(runs.flatMap((run) => [...Object.keys(before(run)), ...Object.keys(after(run))]));
  if (names.length === 0) return;
  const main = names.filter((name) => runs.some((run) => [run.metric, ...MAIN].some((metric) => name === metric || name.endsWith(`_${metric}`))));
  const place = section("gain");
  if (main.length > 0) place.append(table(main));
  if (main.length < names.length) {
    place.append(make("details", main.length > 0 ? {} : { open: "" }, make("summary", {}, `all ${names.length} metrics`), table(names)));
  }
}

// One run: a colour for each line. Several: a colour for each run, dashes for the lines.
function styled(run, line) {
  const dash = several ? line % DASHES.length : Math.floor(line / COLORS) % DASHES.length;
  return { color: several ? runs.indexOf(run) : line, dash };
}

const named = (run, name) => (several ? [run.name, name].filter(Boolean).join(" · ") : name);

function evaluation() {
  const found = new Map();
  for (const run of runs) {
    const names = unique(run.evaluations.flatMap((evaluation) => Object.keys(evaluation.scores)));
    const sets = unique(names.map((name) => metricOf(name).set));
    for (const name of names) {
      const { set, metric } = metricOf(name);
      const series = {
        name: named(run, set) || name,
        x: run.evaluations.map((evaluation) => evaluation.step),
        y: run.evaluations.map((evaluation) => evaluation.scores[name] ?? null),
        ...styled(run, sets.indexOf(set)),
      };
      found.set(metric, [...(found.get(metric) ?? []), series]);
    }
  }
  if (found.size === 0) return;
  const main = [...found.keys()].filter((metric) => runs.some((run) => run.metric === metric) || MAIN.includes(metric));
  const place = section("evaluation");
  const large = make("div", { class: "grid" });
  place.append(large);
  for (const metric of main) new Chart(large, metric, found.get(metric), { whole: true });
  const rest = [...found.keys()].filter((metric) => !main.includes(metric));
  if (rest.length === 0) return;
  const small = make("div", { class: "grid small" });
  place.append(make("details", main.length > 0 ? {} : { open: "" }, make("summary", {}, `${rest.length} more metrics`), small));
  for (const metric of rest) new Chart(small, metric, found.get(metric), { whole: true, height: 150 });
}

function training() {
  const drawn = runs.filter((run) => run.steps.step.length > 0);
  if (drawn.length === 0) return;
  const place = section("training");
  const grid = make("div", { class: "grid" });
  const charts = [];
  const chart = (title, key, options) => {
    const series = drawn.filter((run) => run.steps[key]?.some(known))
      .map((run) => ({ name: run.name, x: run.steps.step, y: run.steps[key], ...styled(run, 0) }));
    if (series.length > 0) charts.push(new Chart(grid, title, series, options));
  };
  chart("Loss", "loss");
  const parts = drawn.flatMap((run) => Object.entries(run.losses).map(([name, losses], line) => {
    // A step without a row of the data set is no gap.
    const there = losses.map((loss, n) => n).filter((n) => known(losses[n]));
    return { name: named(run, name), x: there.map((n) => run.steps.step[n]), y: there.map((n) => losses[n]), ...styled(run, line) };
  }));
  if (parts.length > drawn.length) charts.push(new Chart(grid, "Loss of each data set", parts));
  chart("Gradient norm, before clipping", "grad_norm");
  chart("Learning rate", "learning_rate", { whole: true });
  chart("Tokens per second", "tokens_per_second");
  chart("Share of candidates masked as known positives", "masked");
  const slider = make("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: "0" });
  const value = make("output", {}, "0");
  slider.addEventListener("input", () => {
    value.textContent = slider.value;
    charts.forEach((chart) => chart.smooth(Number(slider.value)));
  });
  const longest = Math.max(...drawn.map((run) => run.steps.step.length));
  const controls = make("div", { class: "controls" }, make("label", {}, "Smoothing ", slider, value));
  if (longest > 30) place.append(controls);
  place.append(grid);
  if (longest > 150) {
    slider.value = "0.9";
    slider.dispatchEvent(new Event("input"));
  }
}

function ranking(title, found) {
  const first = found.first === null ? "none among the first 100" : `first at rank ${found.first}`;
  const hits = found.hits.map((hit) => {
    const item = make("li", hit.relevant ? { class: "relevant" } : {});
    const mark = make("span", {}, hit.relevant ? "✓" : "");
    if (hit.relevant) mark.setAttribute("aria-label", "answers the query");
    item.append(make("span", {}, known(hit.score) ? hit.score.toFixed(3) : "–"), mark, make("span", {}, hit.text));
    return item;
  });
  return make("div", {}, make("h4", {}, `${title}: nDCG@10 ${fixed(found.ndcg)}, ${first}`), make("ol", {}, ...hits));
}

function samples() {
  for (const run of runs) {
    for (const { set, base, tuned } of run.samples) {
      const place = section("samples");
      place.append(make("h3", {}, several ? `${run.name} · ${set}` : set));
      const pairs = base.map((old, n) => [old, tuned[n]]).filter(([old, now]) => now && now.query === old.query);
      pairs.sort((a, b) => Math.abs(b[1].ndcg - b[0].ndcg) - Math.abs(a[1].ndcg - a[0].ndcg));
      const cards = pairs.map(([old, now]) => {
        const delta = now.ndcg - old.ndcg;
        const note = make("small", {}, ` ${old.relevant} relevant, nDCG@10 `, make("span", { class: side(delta) }, signed(delta)));
        const sides = make("div", { class: "sides" }, ranking("before", old), ranking(`after step ${run.chosen.toLocaleString("en")}`, now));
        return make("div", { class: "query" }, make("p", {}, old.query, note), sides);
      });
      place.append(...cards.slice(0, 4));
      if (cards.length > 4) place.append(make("details", {}, make("summary", {}, `${cards.length - 4} more queries`), ...cards.slice(4)));
    }
  }
}

function configuration() {
  for (const run of runs.filter((run) => run.config !== null)) {
    const place = section("configuration");
    if (several) place.append(make("h3", {}, run.name));
    place.append(make("pre", { tabindex: "0" }, run.config));
  }
}

[heading, summary, gain, evaluation, training, samples, configuration].forEach((part) => part());

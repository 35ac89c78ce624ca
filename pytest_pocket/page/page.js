"use strict";
// What models wrote goes into the page by textContent alone: nothing here makes markup of text.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { names, columns, chunk: CHUNK, runs } = data.episodes;
  const COUNT = columns.id.length;
  const PAGE = 50;
  const CUT = 4000;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

  function make(tag, text, className) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  }

  const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
  const sign = (letter) => {
    const code = letter.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
  };
  // Characters that would hide, turn around or end text are shown by a sign.
  function visible(text) { return String(text).replace(CONTROL, sign); }

  // Theme
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  function showTheme() {
    $("theme").setAttribute("aria-pressed", String(isDark()));
    drawCharts();
  }
  $("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  system.addEventListener("change", showTheme);

  // Sorting
  for (const head of document.querySelectorAll(".sortable th[aria-sort] button")) {
    head.addEventListener("click", () => {
      const cell = head.parentElement;
      const table = cell.closest("table");
      const place = cell.cellIndex;
      const sorted = cell.getAttribute("aria-sort");
      // Numbers are read from the top, words from A.
      const down = sorted === "none" ? cell.classList.contains("n") : sorted === "ascending";
      for (const other of table.tHead.querySelectorAll("th")) other.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const { dataset, textContent } = row.cells[place];
        const text = dataset.value ?? textContent;
        return text !== "" && isFinite(text) ? Number(text) : text;
      };
      const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      const missing = (value) => value === "" || value === "-";
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => missing(a) - missing(b) || (down ? order(b, a) : order(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  }

  // Charts.  The tables beside them hold the same numbers.
  let charts = [];
  function drawCharts() {
    for (const chart of charts) chart.dispose();
    charts = [];
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--fg").trim();
    const line = style.getPropertyValue("--line").trim();
    // Okabe and Ito's colours, with a shape for each, so that no reader depends on colour.
    const colours = isDark() ? ["#56b4e9", "#e69f00", "#2fc39a", "#e39ac6"] : ["#0072b2", "#d55e00", "#009e73", "#aa4a86"];
    const looks = ["circle", "rect", "triangle", "diamond"].map((shape, index) => [colours[index], shape]);
    const axis = (more) => ({ axisLabel: { color: ink }, nameTextStyle: { color: ink }, splitLine: { lineStyle: { color: line } }, axisLine: { lineStyle: { color: line } }, ...more });
    const draw = (id, option) => {
      const chart = echarts.init($(id), null, { renderer: "svg" });
      chart.setOption({ animation: !calm, textStyle: { color: ink }, tooltip: { renderMode: "richText" }, grid: { left: 56, right: 24, top: 40, bottom: 56 }, ...option });
      charts.push(chart);
    };
    // An interval as an upright line; it comes and goes with the series of its name.
    const interval = (name, color, points) => ({
      name, type: "line", symbol: "none", silent: true, tooltip: { show: false }, lineStyle: { color, width: 1 }, itemStyle: { color },
      data: points.filter(([, { half }]) => half !== null).flatMap(([x, { value, half }]) => [[x, Math.max(0, value - half)], [x, Math.min(1, Number(value) + half)], [x, null]]),
    });
    if ($("arc-chart")) {
      const prompts = Object.keys(data.arc[0].means);
      draw("arc-chart", {
        legend: { textStyle: { color: ink }, data: prompts },
        xAxis: axis({ type: "category", data: data.arc.map((stage) => stage.model) }),
        yAxis: axis({ type: "value", min: 0, max: 1, name: "mean reward" }),
        series: prompts.flatMap((prompt, index) => [{
          name: prompt, type: "line", symbol: looks[index % 4][1], symbolSize: 12,
          lineStyle: { type: ["solid", "dashed", "dotted"][index % 3] },
          itemStyle: { color: looks[index % 4][0] },
          data: data.arc.map((stage) => (stage.means[prompt] ? Number(stage.means[prompt].value) : null)),
        }, interval(prompt, looks[index % 4][0], data.arc.filter((stage) => stage.means[prompt]).map((stage) => [stage.model, stage.means[prompt]]))]),
      });
    }
    if ($("pareto-chart")) {
      const points = (front) => data.pareto.filter((point) => point.front === front).map((point) => ({ name: point.name, value: [point.tokens, Number(point.reward.value)] }));
      draw("pareto-chart", {
        legend: { textStyle: { color: ink }, data: ["front", "behind it"] },
        xAxis: axis({ type: "value", name: "tokens an episode", nameLocation: "middle", nameGap: 32, scale: true }),
        yAxis: axis({ type: "value", min: 0, max: 1, name: "mean reward" }),
        series: [
          { name: "front", type: "line", step: "end", symbol: "diamond", symbolSize: 14, itemStyle: { color: looks[1][0] }, data: points(true) },
          { name: "behind it", type: "scatter", symbol: "circle", symbolSize: 10, itemStyle: { color: looks[0][0] }, data: points(false) },
          ...[true, false].map((front) => interval(front ? "front" : "behind it", looks[front ? 1 : 0][0],
            data.pareto.filter((point) => point.front === front).map((point) => [point.tokens, point.reward]))),
        ],
      });
    }
  }
  addEventListener("resize", () => charts.forEach((chart) => chart.resize()));

  // The list
  const filters = $("filters");
  const CHOICES = ["model", "prompt", "condition", "task", "outcome"];
  const LOST = "not passed";
  for (const key of CHOICES) {
    for (const name of names[key]) {
      const option = make("option", visible(name));
      option.value = `=${name}`;
      filters.elements[key].append(option);
    }
  }
  let found = [];
  let page = 0;
  let search = 0;
  async function filter() {
    const mine = ++search;
    const asked = {};
    for (const key of CHOICES) {
      const value = filters.elements[key].value;
      asked[key] = value.startsWith("=") ? names[key].indexOf(value.slice(1)) : value;
    }
    const passed = names.outcome.indexOf("passed");
    const words = filters.elements.words.value.toLowerCase();
    const every = filters.elements.every.checked;
    const said = (n) => !words || columns.words[n].toLowerCase().includes(words) || columns.id[n].toLowerCase().includes(words);
    const wanted = [];
    for (let n = 0; n < COUNT; n++) {
      if ((every || columns.counted[n]) && CHOICES.every(
        (key) => asked[key] === "" || asked[key] === columns[key][n] || (asked[key] === LOST && columns.outcome[n] !== passed))) wanted.push(n);
    }
    let hits = wanted.filter(said);
    if (words && filters.elements.whole.checked) {
      hits = [];
      for (let place = 0; place < wanted.length; place++) {
        const n = wanted[place];
        const episode = await episodeOf(n);
        if (mine !== search) return;
        if (place % 500 === 0) $("count").textContent = `searching: ${place} of ${wanted.length}`;
        if (said(n) || strings(episode).some((text) => text.toLowerCase().includes(words))) hits.push(n);
      }
    }
    found = hits;
    page = 0;
    showList();
  }
  // Every text of an episode.
  const strings = (value) => (typeof value === "string" ? [value]
    : value && typeof value === "object" ? Object.values(value).flatMap(strings) : []);
  // The filters stand in the address, so that what is shown can be linked.
  function remember() {
    const asked = new URLSearchParams();
    for (const key of CHOICES) if (filters.elements[key].value) asked.set(key, filters.elements[key].value.replace(/^=/, ""));
    if (filters.elements.words.value) asked.set("words", filters.elements.words.value);
    for (const key of ["whole", "every"]) if (filters.elements[key].checked) asked.set(key, "1");
    history.replaceState(null, "", `#find?${asked}`);
  }
  function find(asked) {
    filters.reset();
    for (const key of CHOICES) {
      const value = asked.get(key) ?? "";
      const options = [...filters.elements[key].options].map((option) => option.value);
      filters.elements[key].value = options.find((option) => option === `=${value}`) ?? (options.includes(value) ? value : "");
    }
    filters.elements.words.value = asked.get("words") ?? "";
    for (const key of ["whole", "every"]) filters.elements[key].checked = asked.get(key) === "1";
    filter();
    $("episodes").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    $("list").querySelector("a")?.focus({ preventScroll: true });
  }
  function showList() {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    $("count").textContent = `${found.length} of ${COUNT} episodes`;
    $("list").parentElement.scrollLeft = 0;
    $("where").textContent = `page ${page + 1} of ${last + 1}`;
    $("previous").disabled = page === 0;
    $("next").disabled = page === last;
    $("list").tBodies[0].replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map((n) => {
      const row = make("tr");
      const link = make("a", `${visible(names.task[columns.task[n]])} ${columns.number[n]}`);
      link.href = address(n);
      const first = make("td");
      first.append(link);
      if (runs.length > 1) first.append(` (${visible(runs[columns.run[n]])})`);
      const reward = columns.reward[n];
      const outcome = names.outcome[columns.outcome[n]];
      row.append(first,
        make("td", `${outcome === "passed" ? "✓" : "✗"} ${visible(outcome)}`, outcome === "passed" ? "good" : "bad"),
        make("td", reward === null ? "invalid" : reward.toFixed(2), "n"),
        ...["model", "prompt", "condition"].map((key) => make("td", visible(names[key][columns[key][n]]))));
      return row;
    }));
  }
  const address = (n) => `#episode=${encodeURIComponent(columns.id[n])}`;
  filters.addEventListener("input", () => { remember(); filter(); });
  filters.addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => { page--; showList(); });
  $("next").addEventListener("click", () => { page++; showList(); });

  // An episode
  const unpacked = new Map();
  const episodeOf = async (n) => (await unpack(Math.floor(n / CHUNK)))[n % CHUNK];
  async function unpack(number) {
    if (!unpacked.has(number)) {
      const text = document.getElementsByClassName("chunk")[number].textContent;
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(number, JSON.parse(await new Response(stream).text()));
      if (unpacked.size > 8) unpacked.delete(unpacked.keys().next().value);
    }
    return unpacked.get(number);
  }
  function words(text, className) {
    const box = make("pre", undefined, className);
    let shown = 0;
    const more = make("button", "");
    more.type = "button";
    const show = () => {
      const end = Math.min(text.length, shown + CUT * (shown ? 25 : 1));
      more.before(visible(text.slice(shown, end)));
      shown = end;
      if (shown >= text.length) more.remove();
      else more.textContent = `show more (${(text.length - shown).toLocaleString("en")} characters left)`;
    };
    more.addEventListener("click", show);
    box.append(more);
    show();
    return box;
  }
  function turnOf(turn, number) {
    const box = make("div", undefined, `turn ${["system", "user", "assistant", "tool"].includes(turn.role) ? turn.role : ""}`);
    box.append(make("h3", `${number}. ${visible(turn.role)}${turn.name ? ` · ${visible(turn.name)}` : ""}`));
    if (turn.thinking) {
      const folded = make("details");
      folded.append(make("summary", "thinking"), words(turn.thinking));
      box.append(folded);
    }
    if (turn.text) box.append(words(turn.text));
    for (const call of turn.calls) {
      box.append(make("h3", `calls ${visible(call.name)}`));
      for (const [key, value] of Object.entries(call.arguments)) {
        box.append(words(`${key} = ${typeof value === "string" ? value : JSON.stringify(value)}`, "call"));
      }
    }
    return box;
  }
  const dialog = $("episode");
  let open = -1;
  async function show(n) {
    open = n;
    const episode = await episodeOf(n);
    if (open !== n) return;
    const outcome = names.outcome[columns.outcome[n]];
    const reward = columns.reward[n];
    $("episode-h").textContent = visible(`${names.task[columns.task[n]]} ${columns.number[n]} · ${names.model[columns.model[n]]} · ${names.prompt[columns.prompt[n]]} ${names.condition[columns.condition[n]]}`);
    const cause = make("div", undefined, `cause ${outcome === "passed" ? "passed" : ""}`);
    cause.append(make("strong", `${visible(outcome)}, ${reward === null ? "invalid" : `reward ${reward.toFixed(3)}`}`));
    for (const check of episode.checks) {
      cause.append(words(`${check.value >= 1 ? "✓" : "✗"} ${check.name}${check.value < 1 && check.value > 0 ? ` ${check.value.toFixed(2)}` : ""}${check.detail ? `: ${check.detail}` : ""}`));
    }
    if (episode.factors) cause.append(make("p", `outcome ${episode.factors.outcome.toFixed(2)} × stopped ${episode.factors.stopped.toFixed(2)} × intact ${episode.factors.intact.toFixed(2)}`, "note"));
    if (episode.detail) cause.append(words(episode.detail));
    const unseen = episode.unseen.length ? ` · kinds that training never shows: ${visible(episode.unseen.join(", "))}` : "";
    const facts = `ended by: ${visible(episode.stop)} · ${episode.tokens[0]} + ${episode.tokens[1]} tokens · ${episode.seconds.toFixed(1)} s · seed ${episode.seed}${unseen}${episode.chosen ? "" : " · not the chosen candidate"}`;
    $("turns").replaceChildren(cause, make("p", facts, "note"), ...episode.turns.map((turn, index) => turnOf(turn, index + 1)));
    const place = found.indexOf(n);
    $("before").disabled = place <= 0;
    $("after").disabled = place < 0 || place >= found.length - 1;
    if (!dialog.open) dialog.showModal();
    $("turns").parentElement.scrollTop = 0;
    $("episode-h").focus();
  }
  const step = (by) => { location.hash = address(found[found.indexOf(open) + by]); };
  $("before").addEventListener("click", () => step(-1));
  $("after").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    open = -1;
    if (location.hash.startsWith("#episode=")) remember();
  });
  function follow() {
    if (!location.hash.startsWith("#episode=")) {
      dialog.close();
      if (location.hash.startsWith("#find?")) find(new URLSearchParams(location.hash.slice(6)));
      return;
    }
    let id = "";
    try { id = decodeURIComponent(location.hash.slice(9)); } catch { /* no such episode */ }
    const n = columns.id.indexOf(id);
    if (n >= 0) show(n);
    else $("count").textContent = "the address names no episode of this page";
  }
  addEventListener("hashchange", follow);
  // A link to where one already is does not change the address.
  addEventListener("click", (event) => {
    if (event.target.closest("a")?.getAttribute("href") === location.hash) follow();
  });

  showTheme();
  filter();
  follow();
  root.dataset.ready = "yes";
})();

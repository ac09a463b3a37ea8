"use strict";
(() => {
  const PAGE = 25;
  const LABELS = {
    "1": ["right", "\u2713"], "0": ["wrong", "\u2717"], "-1": ["none", "\u00b7"],
  };
  const WORDS = { "1": "right", "0": "wrong", "-1": "unlabelled" };
  // Control characters, those that turn or hide text, and halves of surrogate pairs.
  const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|\p{Cs}/gu;

  const get = (id) => document.getElementById(id);
  const data = JSON.parse(get("data").textContent);
  const form = get("filters");
  const chosen = ["run", "round", "set", "answer", "steps", "order"];
  let matching = [];
  let page = 0;

  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Text of a model is only ever set as text; what cannot be seen is spelled out.
  const plain = (parent, text) => {
    let end = 0;
    for (const match of text.matchAll(ODD)) {
      parent.append(text.slice(end, match.index));
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      parent.append(make("span", "odd", "U+" + code));
      end = match.index + match[0].length;
    }
    parent.append(text.slice(end));
  };

  const show = (parent, text, needle) => {
    const lower = text.toLowerCase();
    // where lower case has another length, offsets would not fit
    if (!needle || lower.length !== text.length) return plain(parent, text);
    let end = 0;
    for (let at = lower.indexOf(needle); at !== -1; at = lower.indexOf(needle, end)) {
      plain(parent, text.slice(end, at));
      end = at + needle.length;
      plain(parent.appendChild(make("mark")), text.slice(at, end));
    }
    plain(parent, text.slice(end));
  };

  const finite = (row) => (row.ratios || []).filter((ratio) => typeof ratio === "number");
  const sizes = [];
  for (const row of data.solutions) for (const ratio of finite(row)) sizes.push(Math.abs(ratio));
  sizes.sort((a, b) => a - b);
  // a few outliers must not make all other bars too short to see
  const widest = sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || 1 : 1;
  get("scale").textContent = sizes.length
    ? "a full bar is " + widest.toPrecision(2) + " or more"
    : "none is known here";

  const fill = (id, values, names) => {
    const select = get(id);
    if (values.length < 2) select.parentElement.hidden = true;
    select.append(new Option("any", ""));
    values.forEach((value, i) => select.append(new Option(names ? names[i] : value, value)));
  };
  const distinct = (key) => [...new Set(data.solutions.map((row) => row[key]))];
  fill("run", data.runs.map((_, i) => i), data.runs);
  fill("round", distinct("round").sort((a, b) => a - b));
  fill("set", distinct("set"));

  const stepState = (row) => {
    if (row.labels.includes(0)) return 0;
    return row.labels.includes(1) ? 1 : -1;
  };
  const keys = {
    run: (row) => row.run, round: (row) => row.round, set: (row) => row.set,
    answer: (row) => row.label, steps: stepState,
  };
  const holds = (row, needle) =>
    (row.id || "").toLowerCase().includes(needle) ||
    data.prompts[row.prompt].toLowerCase().includes(needle) ||
    row.steps.join("").toLowerCase().includes(needle);

  const filter = () => {
    const wanted = Object.keys(keys).filter((name) => get(name).value !== "");
    const needle = get("search").value.trim().toLowerCase();
    matching = data.solutions.filter((row) =>
      wanted.every((name) => String(keys[name](row)) === get(name).value) &&
      (!needle || holds(row, needle)));
    const order = get("order").value;
    if (order) {
      const sign = order === "low" ? 1 : -1;
      const edge = (row) => Math.min(...finite(row).map((ratio) => sign * ratio));
      const sorted = matching.map((row) => [edge(row), row]);
      sorted.sort((a, b) => (a[0] === b[0] ? 0 : a[0] < b[0] ? -1 : 1));
      matching = sorted.map((pair) => pair[1]);
    }
    page = 0;
    draw();
  };

  const ratioCell = (ratio) => {
    const cell = make("div", "ratio");
    if (ratio === undefined) return cell;
    const isNumber = typeof ratio === "number";
    const sign = isNumber && ratio > 0 ? "+" : "";
    const number = make("span", "", isNumber ? sign + ratio.toFixed(3) : ratio);
    number.prepend(make("span", "hidden", "log-ratio "));
    cell.append(number);
    if (isNumber) {
      const bar = cell.appendChild(make("div", "bar"));
      const inside = bar.appendChild(make("span", ratio < 0 ? "less" : "more"));
      const width = 50 * Math.min(1, Math.abs(ratio) / widest);
      inside.style.width = width + "%";
      inside.style.left = (ratio < 0 ? 50 - width : 50) + "%";
    }
    return cell;
  };

  const card = (row, needle) => {
    const article = make("article");
    const head = article.appendChild(make("h3"));
    if (row.id !== undefined) {
      const button = head.appendChild(make("button"));
      button.type = "button";
      button.title = "Search for this problem";
      plain(button, row.id);
      button.addEventListener("click", () => {
        form.reset();
        get("search").value = row.id;
        filter();
        get("search").focus();
      });
    }
    head.append(make("span", "verdict " + LABELS[row.label][0], WORDS[row.label] + " answer"));
    const about = [row.set, "round " + row.round];
    if (data.runs.length > 1) about.unshift(data.runs[row.run]);
    if (row.sample !== undefined) about.push("sample " + row.sample);
    if (row.trained !== undefined) about.push(row.trained ? "trained on" : "not trained on");
    head.append(make("span", "about", about.join(", ")));
    show(article.appendChild(make("p", "prompt")), data.prompts[row.prompt], needle);
    const list = article.appendChild(make("ol"));
    row.steps.forEach((text, i) => {
      const label = row.labels.length ? row.labels[i] : -1;
      const item = list.appendChild(make("li", LABELS[label][0]));
      const sign = item.appendChild(make("span", "sign"));
      sign.append(make("span", "hidden", WORDS[label] + " step"));
      const drawn = sign.appendChild(make("span", "", LABELS[label][1]));
      drawn.setAttribute("aria-hidden", "true");
      show(item.appendChild(make("span", "text")), text.replace(/\s+$/, ""), needle);
      item.append(ratioCell(row.ratios && row.ratios[i]));
    });
    return article;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(matching.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const needle = get("search").value.trim().toLowerCase();
    const rows = matching.slice(page * PAGE, (page + 1) * PAGE);
    get("list").replaceChildren(...rows.map((row) => card(row, needle)));
    get("count").textContent = matching.length
      ? (page * PAGE + 1) + "\u2013" + (page * PAGE + rows.length) + " of " + matching.length +
        ", page " + (page + 1) + " of " + pages
      : "No solution fits";
    get("previous").disabled = page === 0;
    get("next").disabled = page === pages - 1;
  };

  const turn = (pages) => {
    page += pages;
    draw();
    get("solutions").querySelector(".pages").scrollIntoView();
  };
  let waiting = 0;
  chosen.forEach((id) => get(id).addEventListener("change", filter));
  get("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 150);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter, 0));
  get("previous").addEventListener("click", () => turn(-1));
  get("next").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      event.preventDefault();
      get("search").focus();
    } else if (event.key === "n" && !get("next").disabled) turn(1);
    else if (event.key === "p" && !get("previous").disabled) turn(-1);
  });
  form.hidden = get("legend").hidden = form.parentElement.querySelector(".pages").hidden = false;
  filter();
})();

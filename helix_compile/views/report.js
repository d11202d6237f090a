"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const count = (n) => n.toLocaleString("en-US");
  const size = (n) => {
    if (n < 10000) return `${count(n)} B`;
    const units = ["kB", "MB", "GB", "TB"];
    let unit = -1;
    do { n /= 1000; unit += 1; } while (n >= 1000 && unit < 3);
    return `${n.toFixed(1)} ${units[unit]}`;
  };

  // The round-robin ledger, as in helix_compile/layout/ledger.py; a test compares the two.
  const { cp, tokens_per_block: perBlock } = facts.kv;
  const ownerRank = (position) => Math.floor(position / perBlock) % cp;
  const localSlot = (position) =>
    Math.floor(Math.floor(position / perBlock) / cp) * perBlock + (position % perBlock);
  const localLength = (length, rank) => {
    const turn = perBlock * cp;
    const rest = (length % turn) - rank * perBlock;
    return Math.floor(length / turn) * perBlock + Math.min(Math.max(rest, 0), perBlock);
  };
  const blocksOfRank = (length, rank) => {
    const blocks = [];
    for (let block = rank; block * perBlock < length; block += cp) blocks.push(block);
    return blocks;
  };

  // A body's pictures and its schedule show together.
  const showBody = (name) => {
    for (const part of all("figure[data-body], #schedule ol")) part.hidden = part.dataset.body !== name;
    for (const tab of all(".tabs button")) tab.setAttribute("aria-pressed", String(tab.dataset.body === name));
    closeDetails();
  };

  const details = document.getElementById("details");
  const closeDetails = () => {
    details.hidden = true;
    for (const node of all(".chosen, .related")) node.classList.remove("chosen", "related");
  };
  const placementText = (placement) => {
    if (placement === "R") return "replicated";
    if (placement === "L") return "each rank its own";
    if (placement === "PS") return "partial softmax, merged by log-sum-exp";
    const [kind, what] = placement.replace(")", "").split("(");
    return kind === "S" ? `cut along dim ${what}` : `partial ${what}`;
  };
  const layoutText = (layout) => {
    const named = Object.entries(layout).map(([axis, p]) => `${axis}: ${placementText(p)}`);
    return [...named, named.length ? "other axes: replicated" : "every axis: replicated"].join("; ");
  };
  const valueText = (v) => `${v.dtype} ${v.shape}`;
  const entry = (list, name, lines, code) => {
    if (!lines.length) return;
    const group = element("div");
    group.append(element("dt", "", name));
    for (const line of lines) {
      const value = element("dd");
      value.append(element(code ? "code" : "span", "", line));
      group.append(value);
    }
    list.append(group);
  };
  const inputText = (p) => `${p.name}  ${valueText(p.value)}, ${layoutText(p.value.layout)}, ${p.value.bytes} bytes`;
  const showDetails = (figure, name) => {
    const { body, moment } = figure.dataset;
    const node = facts.bodies[body][moment][name];
    closeDetails();
    const bar = element("div", "bar");
    const title = element("h3", "", `${node.title} `);
    title.append(element("span", "", `${node.name} in ${body}, ${moment}`));
    const close = element("button", "", "close");
    close.type = "button";
    close.addEventListener("click", closeDetails);
    bar.append(title, close);
    const list = element("dl");
    const outputs = node.outputs || [];
    entry(list, "shape", outputs.map(valueText), true);
    entry(list, "layout per axis", [...new Set(outputs.map((v) => layoutText(v.layout)))], false);
    entry(list, "bytes on a rank", outputs.map((v) => v.bytes), true);
    entry(list, "sent by each rank for a token", node.egress === undefined ? [] : [size(node.egress)], false);
    entry(list, "stage", [node.stage], false);
    entry(list, "source line", node.source ? [node.source] : [], true);
    entry(list, "op", node.members ? [] : [node.op], true);
    entry(list, "ops in this box", node.members ? [node.members.map((m) => m[1]).join(", ")] : [], true);
    entry(list, "comes from", node.origin ? [node.origin.join(", ")] : [], true);
    entry(list, "parameters", (node.params || []).map(inputText), true);
    entry(list, "inputs of the step", (node.step_inputs || []).map(inputText), true);
    details.replaceChildren(bar, list);
    details.hidden = false;
    mark(body, moment, name, node.origin || []);
    // the panel lies over the page's lower part: a box behind it moves up
    const covered = document.querySelector(".chosen").getBoundingClientRect().bottom + 16 - details.getBoundingClientRect().top;
    if (covered > 0) window.scrollBy(0, covered);
  };
  const mark = (body, moment, name, origin) => {
    for (const figure of all(`figure[data-body="${CSS.escape(body)}"]`)) {
      for (const node of all(".node", figure)) {
        const here = node.dataset.node;
        if (figure.dataset.moment === moment && here === name) node.classList.add("chosen");
        else if (figure.dataset.moment !== moment && (here === name || origin.includes(here)))
          node.classList.add("related");
      }
    }
  };

  // At most this many blocks of a rank are drawn; the middle of a long list says how many it leaves out.
  const DRAWN = 48;
  const blockCell = (block, length) => {
    const filled = Math.min(perBlock, length - block * perBlock);
    const cell = element("span", "block", String(block));
    cell.dataset.block = block;
    cell.title = `tokens ${count(block * perBlock)} to ${count(block * perBlock + filled - 1)}`;
    cell.style.setProperty("--full", `${(100 * filled) / perBlock}%`);
    if ((block + 1) * perBlock >= length) cell.classList.add("last");
    return cell;
  };
  const rankRow = (rank, length) => {
    const row = element("div", "rank");
    row.dataset.rank = rank;
    const tokens = localLength(length, rank);
    row.dataset.tokens = tokens;
    const blocks = blocksOfRank(length, rank);
    const who = element("div", "who", `rank ${rank}: ${count(tokens)} tokens`);
    const bytes = size(tokens * facts.kv.bytes_per_owned_token);
    who.append(element("span", "", `${count(blocks.length)} blocks, ${bytes} a sequence`));
    const cells = element("div", "blocks");
    if (blocks.length <= DRAWN) cells.append(...blocks.map((b) => blockCell(b, length)));
    else {
      const tail = 6;
      const head = DRAWN - tail;
      cells.append(...blocks.slice(0, head).map((b) => blockCell(b, length)));
      cells.append(element("em", "", `${count(blocks.length - DRAWN)} more`));
      cells.append(...blocks.slice(-tail).map((b) => blockCell(b, length)));
    }
    if (!blocks.length) cells.append(element("em", "", "an empty shard"));
    row.append(who, cells);
    return row;
  };
  const showLength = (length) => {
    const rows = [];
    for (let rank = 0; rank < cp; rank += 1) rows.push(rankRow(rank, length));
    document.getElementById("ranks").replaceChildren(...rows);
    const next = length < facts.kv.max_seq_len
      ? `Token ${count(length)} comes next: block ${count(Math.floor(length / perBlock))}, ` +
        `rank ${ownerRank(length)}, local slot ${count(localSlot(length))}.`
      : "The sequence is full.";
    document.getElementById("next-token").textContent = next;
  };

  const slider = document.getElementById("length");
  const number = document.getElementById("length-number");
  slider.addEventListener("input", () => { number.value = slider.value; showLength(Number(slider.value)); });
  number.addEventListener("input", () => {
    const wanted = Math.min(Math.max(Math.floor(Number(number.value) || 0), 0), facts.kv.max_seq_len);
    slider.value = wanted;
    showLength(wanted);
  });
  for (const tab of all(".tabs button")) tab.addEventListener("click", () => showBody(tab.dataset.body));
  for (const node of all(".node")) {
    const show = () => showDetails(node.closest("figure"), node.dataset.node);
    node.addEventListener("click", show);
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); show(); }
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") closeDetails(); });
  showLength(Number(slider.value));
  window.helixReport = { ownerRank, localSlot, localLength, blocksOfRank };
})();

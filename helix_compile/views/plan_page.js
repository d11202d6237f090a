"use strict";
// Adds up the terms of each layout, as predict/search.py does; predicted, never measured.
const helixPlan = (() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const machine = facts.machine, TIE = 0.02, SMALL = 4096, LARGE = 131072, PAGE = 128;
  const by = (id) => document.getElementById(id);

  function localLength(length, cp) {
    const block = facts.tokens_per_block, round = block * cp;
    return Math.floor(length / round) * block + Math.min(length % round, block);
  }

  function seen([kind, width], context, cp) {
    const held = localLength(context + 1, cp);
    if (kind === "top") return Math.min(held, Math.ceil(width / cp));
    let oldest = 0;
    if (kind === "window") oldest = Math.max(0, context + 1 - width);
    else if (kind === "chunk") oldest = Math.floor(context / width) * width;
    return held - localLength(oldest, cp);
  }

  function atRanks(rows, ranks, op) {
    const last = rows.length - 1;
    if (ranks <= rows[0][0]) return rows[0][1];
    if (last === 0) return rows[0][1];
    for (let i = 1; i <= last; i++) {
      const [before, low] = rows[i - 1], [after, high] = rows[i];
      if (ranks <= after) return low + (high - low) * Math.log2(ranks / before) / Math.log2(after / before);
    }
    const [before, low] = rows[last - 1], [end, high] = rows[last];
    if (op === "all_to_all_single") return high;
    return high + Math.max(0, high - low) * Math.log2(ranks / end) / Math.log2(end / before);
  }

  function latency(op, ranks, bytes) {
    const rows = [...machine.latency_us[op]].sort((a, b) => a[0] - b[0]);
    const [small, large] = [1, 2].map((i) => atRanks(rows.map((r) => [r[0], r[i]]), ranks, op));
    if (bytes <= SMALL) return small;
    return small + Math.min(1, Math.log2(bytes / SMALL) / Math.log2(LARGE / SMALL)) * (large - small);
  }

  function termUs(term, state, cp, B) {
    const [kind, f0, f1, fL, b0, b1, bL, weights, cached, wire, peers, routed, reach] = term;
    const cache = facts.caches[state.cache];
    if (!["attention", "matmul", "other"].includes(kind)) return latency(kind, peers, wire * B) + wire * B / (state.link * 1e3);
    const L = seen(reach, state.context - 1, cp);
    const peak = kind === "attention" ? cache.peak : kind === "matmul" ? facts.weights.peak : "bf16";
    const hit = routed ? 1 - Math.pow(1 - routed[0] / routed[1], B) : 1;
    const flops = f0 + f1 * B + fL * B * L;
    const bytes = b0 + b1 * B + bL * B * L + facts.weights.read * hit * weights + cache.read * cached * B * L;
    return Math.max(flops / machine.flops_per_us[peak], bytes / machine.bytes_per_us);
  }

  // attention and exchange in parts of the batch, as predict/overlap.py: what compute waits for the link
  function heldUs(steps, parts) {
    let compute = 0, link = 0, busy = 0;
    const arrives = Array(parts).fill(0);
    for (let time = 0; time < parts + steps.length - 1; time++) {
      steps.forEach((step, late) => {
        const part = time - late;
        if (part < 0 || part >= parts) return;
        compute = Math.max(compute, arrives[part]) + step.compute[part];
        busy += step.compute[part];
        if (step.starts) {
          link = Math.max(link, compute) + step.exchange[part];
          arrives[part] = link;
        }
      });
    }
    return Math.max(compute, link) - busy;
  }

  // what a group takes: once, on the link, and in each part of the batch
  function groupUs(terms, state, cp, B, parts) {
    const own = { us: 0, moved: 0, launches: 0, more: 0, chunks: new Map() };
    const rows = Array.from({ length: parts }, (_, i) => Math.floor(B * (i + 1) / parts) - Math.floor(B * i / parts));
    for (const term of terms) {
      const [kind, launches, chunk, whole] = [term[0], term[13], term[14], term[15]];
      const onLink = !["attention", "matmul", "other"].includes(kind);
      own.launches += launches;
      if (!chunk) {
        const time = termUs(term, state, cp, B) + machine.launch_us * launches;
        own.us += time;
        if (onLink && kind !== "all_reduce") own.moved += time;
        continue;
      }
      own.more += (parts - 1) * launches;
      const key = chunk.join();
      if (!own.chunks.has(key)) {
        own.chunks.set(key, { place: chunk, compute: Array(parts).fill(0), exchange: Array(parts).fill(0), starts: false });
      }
      const step = own.chunks.get(key);
      rows.forEach((count, part) => {
        const time = termUs(term, state, cp, whole ? B : count * parts) + machine.launch_us * launches;
        step[onLink ? "exchange" : "compute"][part] += time;
        if (!onLink) own.us += time;
      });
      step.starts ||= onLink;
    }
    return own;
  }

  // what a layer waits for its parts' exchanges, and what the launches of the other parts take
  function bodyUs(groups, parts) {
    const steps = new Map();
    for (const { chunks } of groups) {
      for (const [key, step] of chunks) {
        if (!steps.has(key)) { steps.set(key, step); continue; }
        const one = steps.get(key), sum = (a, b) => a.map((x, i) => x + b[i]);
        steps.set(key, { place: step.place, compute: sum(one.compute, step.compute), exchange: sum(one.exchange, step.exchange),
          starts: one.starts || step.starts });
      }
    }
    const order = [...steps.values()].sort((a, b) => compare(a.place, b.place));
    const sites = [...new Set(order.map((step) => step.place[0]))];
    const held = sites.reduce((us, site) => us + heldUs(order.filter((step) => step.place[0] === site), parts), 0);
    const sum = (name) => groups.reduce((total, group) => total + group[name], 0);
    return [held, machine.fixed_us_per_layer * sum("more") / sum("launches")];
  }

  // every layout at every batch; `state`: context, batch (the most), link, cache
  function evaluate(state) {
    const known = new Map(), points = [];
    const batches = facts.batches.filter((b) => b <= state.batch);
    facts.plans.forEach((plan, number) => {
      const pages = Math.max(1, Math.ceil(localLength(state.context, plan.cp) / PAGE));
      for (const B of batches) {
        if (B < plan.least_batch) continue;
        let us = machine.fixed_us_per_layer * facts.layers, exchange = 0;
        const bodies = new Map();
        for (const [group, layers, body, parts] of plan.groups) {
          const key = `${group},${plan.cp},${B}`;
          if (!known.has(key)) known.set(key, groupUs(facts.groups[group], state, plan.cp, B, parts));
          const own = known.get(key);
          us += layers * own.us;
          exchange += layers * own.moved;
          if (parts > 1) {
            if (!bodies.has(body)) bodies.set(body, { layers, parts, groups: [] });
            bodies.get(body).groups.push(own);
          }
        }
        for (const { layers, parts, groups } of bodies.values()) {
          const [held, launches] = bodyUs(groups, parts);
          us += layers * (held + launches);
          exchange += layers * held;
        }
        const kv = Math.trunc(B * plan.kv[state.cache] * plan.cp * pages * PAGE);
        const taken = plan.params + Math.trunc(2 * plan.buffer * B);
        points.push({
          number, plan, batch: B, us, exchange, kv, bytes: taken + kv, fits: taken + kv <= machine.room,
          tokens: Math.max(0, Math.trunc((machine.room - taken) / plan.kv[state.cache])),
          user: 1e6 / us, gpu: B * 1e6 / (us * plan.ranks),
        });
      }
    });
    return points;
  }

  const plainness = ({ plan }) => [plan.cp, +plan.pad_heads, +(plan.q_proj !== "replicate"), +(plan.merge !== "a2a"),
    +(plan.overlap !== "none"), plan.tpa, -plan.ep, plan.v_up];
  function compare(a, b) {
    for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return a[i] < b[i] ? -1 : 1;
    return 0;
  }

  function pareto(points) {
    const front = [];
    const order = points.filter((p) => p.fits)
      .sort((a, b) => compare([-a.user, -a.gpu, ...plainness(a)], [-b.user, -b.gpu, ...plainness(b)]));
    for (const p of order) if (!front.length || p.gpu > front[front.length - 1].gpu * (1 + 1e-12)) front.push(p);
    return front;
  }

  function recommended(points) {
    const worth = (p) => p.gpu * (facts.least ? 1 : p.user);
    const enough = points.filter((p) => p.fits && p.user >= facts.least);
    const best = Math.max(...enough.map(worth));
    const near = enough.filter((p) => worth(p) >= best * (1 - TIE));
    return near.sort((a, b) => compare([...plainness(a), -worth(a)], [...plainness(b), -worth(b)]))[0] || null;
  }

  function bestAt(points, batch, ranks, exchanges) {
    return points.filter((p) => p.fits && p.batch === batch && p.plan.ranks === ranks && (p.plan.cp > 1) === exchanges)
      .sort((a, b) => compare([a.us, ...plainness(a)], [b.us, ...plainness(b)]))[0] || null;
  }

  const round = (x, digits = 1) => x.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
  const counted = (ranks) => `${ranks} rank${ranks === 1 ? "" : "s"}`;
  const named = ({ plan }) => `cp=${plan.cp}, tpa=${plan.tpa}, ep=${plan.ep}, tpf=${plan.tpf}` +
    (plan.overlap === "none" ? "" : `, overlap=${plan.overlap}`);

  function state() {
    const exact = (id) => (by(id).dataset.moved ? Math.round(Math.pow(2, +by(id).value)) : +by(id).dataset.exact);
    return { context: exact("context"), batch: facts.batches[+by("batch").value], link: exact("link"), cache: by("cache").value };
  }

  function fill(table, heads, rows, chosen) {
    table.replaceChildren();
    const head = table.createTHead().insertRow();
    for (const text of heads) head.appendChild(Object.assign(document.createElement("th"), { textContent: text }));
    const body = table.createTBody();
    rows.forEach((cells, i) => {
      const row = body.insertRow();
      if (i === chosen) row.className = "chosen";
      for (const text of cells) row.insertCell().textContent = text;
    });
  }

  function draw(points, best) {
    const svg = by("front"), box = { left: 58, right: 700, top: 14, bottom: 318 };
    svg.replaceChildren();
    const make = (name, attributes, text) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      if (text !== undefined) element.textContent = text;
      return element;
    };
    const sides = [["plain", pareto(points.filter((p) => p.plan.cp === 1))], ["helix", pareto(points.filter((p) => p.plan.cp > 1))]];
    const all = sides.flatMap(([, front]) => front);
    if (!all.length) return;
    const range = (values) => [Math.min(...values) / 1.1, Math.max(...values) * 1.1];
    const [x0, x1] = range(all.map((p) => p.user)), [y0, y1] = range(all.map((p) => p.gpu));
    const x = (v) => box.left + (box.right - box.left) * Math.log(v / x0) / Math.log(x1 / x0);
    const y = (v) => box.bottom - (box.bottom - box.top) * Math.log(v / y0) / Math.log(y1 / y0);
    for (let i = 0; i <= 4; i++) {
      const [u, g] = [x0 * Math.pow(x1 / x0, i / 4), y0 * Math.pow(y1 / y0, i / 4)];
      svg.append(make("line", { class: "rule", x1: x(u), x2: x(u), y1: box.top, y2: box.bottom }),
        make("line", { class: "rule", x1: box.left, x2: box.right, y1: y(g), y2: y(g) }),
        make("text", { x: x(u), y: box.bottom + 16, "text-anchor": "middle" }, round(u)),
        make("text", { x: box.left - 6, y: y(g) + 4, "text-anchor": "end" }, round(g)));
    }
    svg.append(make("text", { x: box.right, y: 354, "text-anchor": "end" }, "tokens/s of a user; upwards: tokens/s of a GPU (predicted)"));
    for (const [name, front] of sides) {
      svg.append(make("polyline", { class: name, points: front.map((p) => `${x(p.user)},${y(p.gpu)}`).join(" ") }));
      for (const p of front) {
        const dot = make("circle", { class: name, cx: x(p.user), cy: y(p.gpu), r: 3.5 });
        dot.append(make("title", {}, `${named(p)}, batch ${p.batch}: ${round(p.user)} a user, ${round(p.gpu)} a GPU`));
        svg.append(dot);
      }
    }
    if (best) svg.append(make("circle", { class: "chosen", cx: x(best.user), cy: y(best.gpu), r: 8 }));
  }

  function show() {
    const now = state(), points = evaluate(now), best = recommended(points), front = pareto(points);
    by("context-is").textContent = now.context.toLocaleString("en");
    by("batch-is").textContent = now.batch;
    by("link-is").textContent = now.link.toLocaleString("en");
    const gb = (bytes) => `${round(bytes / 1e9)} GB`;
    by("winner").textContent = best
      ? `${named(best)}, batch ${best.batch} on ${counted(best.plan.ranks)}: predicted ${round(best.user)} tokens/s a user, ` +
        `${round(best.gpu)} a GPU; ${gb(best.kv)} of KV cache on a rank, ${gb(best.bytes)} in all; ` +
        `${best.tokens.toLocaleString("en")} tokens fit`
      : "nothing fits";
    const most = Math.max(...facts.plans.map((p) => p.ranks));
    const ranks = best && best.plan.ranks > 1 ? best.plan.ranks : most;
    const rows = facts.batches.filter((b) => b <= now.batch).map((batch) => {
      const [plain, helix] = [false, true].map((exchanges) => bestAt(points, batch, ranks, exchanges));
      const gain = plain && helix ? plain.us / helix.us : plain ? 0 : Infinity;
      const winner = !plain && !helix ? "none fits" : gain > 1 + TIE ? "cp>1" : gain < 1 - TIE ? "cp=1" : "equal";
      return { batch, plain, helix, winner };
    });
    const lost = rows.filter((r) => r.winner === "cp=1" || r.winner === "equal").map((r) => r.batch);
    by("verdict").textContent = lost.length
      ? `do not use Helix here: at batch ${lost.join(", ")} on ${counted(ranks)} cp=1 is predicted as fast or faster` : "";
    const exists = (exchanges) => facts.plans.some((p) => p.ranks === ranks && (p.cp > 1) === exchanges);
    const cell = (p, exchanges) => (p ? `${round(p.us, 0)} us, ${named(p)}` : exists(exchanges) ? "does not fit" : "no such layout");
    fill(by("batches"), ["batch", "best with cp=1", "best with cp>1", "faster"],
      rows.map((r) => [r.batch, cell(r.plain, false), cell(r.helix, true), r.winner]), -1);
    fill(by("pareto"), ["layout", "batch", "tokens/s/user", "tokens/s/GPU", "KV cache/rank", "all/rank", "tokens that fit"],
      front.map((p) => [named(p), p.batch, round(p.user), round(p.gpu), gb(p.kv), gb(p.bytes), p.tokens.toLocaleString("en")]),
      front.indexOf(best));
    draw(points, best);
  }

  function asAsked() {
    for (const id of ["context", "link"]) {
      by(id).value = Math.log2(+by(id).dataset.exact);
      delete by(id).dataset.moved;
    }
    by("batch").value = facts.batches.length - 1;
    by("cache").value = facts.cache;
    show();
  }

  for (const id of ["context", "link"]) by(id).addEventListener("input", () => { by(id).dataset.moved = "1"; show(); });
  for (const id of ["batch", "cache"]) by(id).addEventListener("input", show);
  by("reset").addEventListener("click", asAsked);
  asAsked();
  return { facts, evaluate, pareto, recommended, state };
})();

// The panel of rank groups: one card per group with its ranks and two buttons, updated live, without a framework. A card
// shows the group's last status, from GET /hv15/groups or an `hv15.group` event. Its elements are updated in place, so
// that its buttons can be clicked while the group decodes.

const TEXTS = {
  en: {
    title: "Rank groups",
    none: "No rank group is running. Queue a prompt with a Rank Group node.",
    restart: "Restart",
    stop: "Stop",
    unreachable: "The server did not respond.",
    jobs: { decode: "decode", denoise: "denoise" },
    step: (job, [step, steps]) => `${job}, step ${step} of ${steps}`,
    states: {
      starting: "starting", ready: "ready", loading: "loading", busy: "busy", releasing: "releasing",
      recovering: "recovering", failed: "failed", stopped: "stopped",
    },
  },
  zh: {
    title: "进程组",
    none: "没有正在运行的进程组。请运行带有“进程组”节点的工作流。",
    restart: "重启",
    stop: "停止",
    unreachable: "服务器没有响应。",
    jobs: { decode: "解码", denoise: "去噪" },
    step: (job, [step, steps]) => `${job}，第 ${step} 步，共 ${steps} 步`,
    states: {
      starting: "启动中", ready: "就绪", loading: "加载中", busy: "运行中", releasing: "释放中", recovering: "恢复中",
      failed: "失败", stopped: "已停止",
    },
  },
};

const COLORS = {
  starting: "#8a6500", ready: "#2c7a45", loading: "#2563b0", busy: "#2563b0", releasing: "#8a6500",
  recovering: "#8a6500", failed: "#b13232",
};

export function textsFor(locale) {
  return TEXTS[locale?.startsWith("zh") ? "zh" : "en"];
}

const BETWEEN_STEPS_MS = 700; // a group is ready for a moment between two steps of a series

/** Return what a busy rank does, such as "denoise, step 12 of 50" or "decode 40 %". */
function activityOf(rank, group, texts) {
  const job = texts.jobs[group.job] ?? group.job;
  return group.step ? texts.step(job, group.step) : `${job} ${Math.floor(100 * progressOf(rank))} %`;
}

/** Return the progress of a rank's job, 0 to 1. */
function progressOf(rank) {
  return rank.total ? Math.min(1, rank.done / rank.total) : 0;
}

/** Show the groups in `element` and keep them up to date. Return a function that removes the panel. */
export function mountPanel(element, api, locale = "en") {
  const texts = textsFor(locale);
  const cards = new Map();
  const note = make("p");
  const root = make("div", { className: "hv15-panel" });
  root.style.cssText = "padding:12px;overflow:auto;height:100%;font-size:13px";
  root.append(note);
  element.replaceChildren(root);

  const showNote = (text) => {
    note.textContent = text;
    note.hidden = !text;
  };
  const showGroup = (group) => {
    if (!cards.has(group.id)) {
      cards.set(group.id, makeCard(group.id, texts, act));
      root.append(cards.get(group.id).box);
    }
    const card = cards.get(group.id);
    clearTimeout(card.waiting);
    if (group.state === "ready" && card.inSeries) {
      card.inSeries = false;
      card.waiting = setTimeout(() => card.show(group), BETWEEN_STEPS_MS);
    } else {
      card.inSeries = group.step ? group.step[0] < group.step[1] : false;
      card.show(group);
    }
    showNote("");
  };
  const refresh = async () => {
    try {
      const groups = await (await api.fetchApi("/hv15/groups")).json();
      const ids = new Set(groups.map((group) => group.id));
      for (const [id, { box }] of cards) {
        if (ids.has(id)) continue;
        box.remove();
        cards.delete(id);
      }
      groups.forEach(showGroup);
      showNote(groups.length ? "" : texts.none);
    } catch {
      showNote(texts.unreachable);
    }
  };
  const act = async (id, action) => {
    await api.fetchApi(`/hv15/groups/${id}/${action}`, { method: "POST" }).catch(() => {});
    await refresh(); // also shows that the server or the group no longer exists
  };
  const onGroup = (event) => showGroup(event.detail);
  api.addEventListener("hv15.group", onGroup);
  api.addEventListener("reconnected", refresh);
  showNote(texts.none);
  refresh();
  return () => {
    api.removeEventListener("hv15.group", onGroup);
    api.removeEventListener("reconnected", refresh);
    root.remove();
  };
}

function makeCard(id, texts, act) {
  const box = make("section", { className: "hv15-group" });
  box.dataset.group = id;
  box.style.cssText = "border:1px solid var(--border-color,#555);border-radius:8px;padding:10px;margin-bottom:10px";
  const head = make("div");
  head.style.cssText = "display:flex;align-items:center;gap:8px";
  const name = make("b");
  name.style.flex = "1";
  const state = makeBadge();
  const buttons = Object.fromEntries(
    ["restart", "stop"].map((action) => [action, makeButton(action, texts[action], () => act(id, action))]),
  );
  head.append(name, state, buttons.restart, buttons.stop);
  const lines = make("div");
  const error = make("p");
  error.style.color = COLORS.failed;
  box.append(head, lines, error);
  let ranks = [];

  const show = (group) => {
    box.dataset.state = group.state;
    name.textContent = group.ranks.map((rank) => rank.device).join(", ") || group.id;
    showState(state, group.state, texts);
    buttons.stop.disabled = group.state === "stopped";
    for (const [action, button] of Object.entries(buttons)) button.ariaLabel = `${texts[action]}: ${name.textContent}`;
    if (ranks.length !== group.ranks.length) {
      ranks = group.ranks.map(makeRank);
      lines.replaceChildren(...ranks.map(({ line }) => line));
    }
    group.ranks.forEach((rank, index) => ranks[index].show(rank, group, texts));
    error.textContent = group.error ?? "";
  };
  return { box, show };
}

function makeRank() {
  const line = make("div", { className: "hv15-rank" });
  line.style.cssText = "display:flex;align-items:center;gap:8px;margin-top:6px";
  const name = make("span");
  name.style.width = "80px";
  const bar = make("progress", { max: 1 });
  bar.style.flex = "1";
  const state = makeBadge();
  line.append(name, bar, state);

  const show = (rank, group, texts) => {
    name.textContent = `${rank.rank}  ${rank.device}`;
    bar.value = progressOf(rank);
    bar.ariaLabel = name.textContent;
    showState(state, rank.state, texts);
    if (rank.state === "busy" && group.job) state.textContent = activityOf(rank, group, texts);
  };
  return { line, show };
}

function makeButton(action, label, press) {
  const button = make("button", { textContent: label, className: `hv15-${action}` });
  button.style.cssText = "padding:2px 8px;border-radius:6px;border:1px solid var(--border-color,#555);cursor:pointer";
  button.onclick = async () => {
    button.disabled = true;
    await press();
    button.disabled = action === "stop" && button.closest(".hv15-group")?.dataset.state === "stopped";
  };
  return button;
}

function makeBadge() {
  const element = make("span", { className: "hv15-state" });
  element.style.cssText = "color:#fff;border-radius:6px;padding:1px 6px;font-size:11px";
  return element;
}

function showState(badge, state, texts) {
  badge.textContent = texts.states[state] ?? state;
  badge.style.background = COLORS[state] ?? "#666";
}

function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

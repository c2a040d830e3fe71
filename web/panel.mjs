// How the rank groups are, live: each group with its ranks, and two buttons. No framework, no state of its own but
// the last status of each group, by id, as GET /hv15/groups and the `hv15.group` event give it.

const TEXTS = {
  en: {
    none: "No rank group is running. Queue a prompt with a Rank Group node.",
    restart: "Restart",
    stop: "Stop",
    failed: "The server did not answer",
    starting: "starting", ready: "ready", busy: "busy", recovering: "recovering", failedState: "failed", stopped: "stopped",
  },
  zh: {
    none: "没有正在运行的进程组。请运行带有“进程组”节点的工作流。",
    restart: "重启",
    stop: "停止",
    failed: "服务器没有响应",
    starting: "启动中", ready: "就绪", busy: "解码中", recovering: "恢复中", failedState: "失败", stopped: "已停止",
  },
};

const COLORS = {
  starting: "#d9a514", ready: "#3fa45b", busy: "#3b82d6", recovering: "#d9a514", failed: "#d64545", stopped: "#888",
};

/** Part done, 0..1, of a rank's work. */
export function partDone(rank) {
  return rank.total ? Math.min(1, rank.done / rank.total) : 0;
}

/** Show the groups in `element` and keep them up to date. Returns what takes the panel down again. */
export function mountPanel(element, api, locale = "en") {
  const texts = TEXTS[locale?.startsWith("zh") ? "zh" : "en"];
  const groups = new Map();
  const root = make("div", { className: "hv15-panel" });
  root.style.cssText = "padding:12px;overflow:auto;height:100%;font-size:13px";
  element.replaceChildren(root);

  const show = () => {
    const cards = [...groups.values()].map((group) => card(group, texts, act));
    root.replaceChildren(...(cards.length ? cards : [make("p", { textContent: texts.none })]));
  };
  const put = (group) => {
    groups.set(group.id, group);
    show();
  };
  const onGroup = (event) => put(event.detail);
  const refresh = async () => {
    try {
      const answer = await api.fetchApi("/hv15/groups");
      groups.clear();
      for (const group of await answer.json()) groups.set(group.id, group);
      show();
    } catch {
      root.replaceChildren(make("p", { textContent: texts.failed }));
    }
  };
  const act = async (id, action) => {
    await api.fetchApi(`/hv15/groups/${id}/${action}`, { method: "POST" }).catch(() => {});
    await refresh(); // tells, too, that the server is gone, or the group
  };
  api.addEventListener("hv15.group", onGroup);
  api.addEventListener("reconnected", refresh);
  show();
  refresh();
  return () => {
    api.removeEventListener("hv15.group", onGroup);
    api.removeEventListener("reconnected", refresh);
    root.remove();
  };
}

function card(group, texts, act) {
  const box = make("section", { className: "hv15-group" });
  box.dataset.group = group.id;
  box.dataset.state = group.state;
  box.style.cssText = "border:1px solid var(--border-color,#555);border-radius:8px;padding:10px;margin-bottom:10px";
  const head = make("div");
  head.style.cssText = "display:flex;align-items:center;gap:8px";
  const name = make("b", { textContent: group.ranks.map((rank) => rank.device).join(", ") || group.id });
  name.style.flex = "1";
  head.append(name, badge(group.state, texts));
  for (const action of ["restart", "stop"]) {
    const button = make("button", { textContent: texts[action], className: `hv15-${action}` });
    button.disabled = action === "stop" && group.state === "stopped";
    button.style.cssText = "padding:2px 8px;border-radius:6px;border:1px solid var(--border-color,#555);cursor:pointer";
    button.onclick = async () => {
      button.disabled = true;
      await act(group.id, action);
    };
    head.append(button);
  }
  box.append(head, ...group.ranks.map((rank) => rankLine(rank, texts)));
  if (group.error) {
    const error = make("p", { textContent: group.error });
    error.style.color = COLORS.failed;
    box.append(error);
  }
  return box;
}

function rankLine(rank, texts) {
  const line = make("div", { className: "hv15-rank" });
  line.style.cssText = "display:flex;align-items:center;gap:8px;margin-top:6px";
  const name = make("span", { textContent: `${rank.rank}  ${rank.device}`, title: `pid ${rank.pid ?? "-"}` });
  name.style.width = "80px";
  const bar = make("progress", { max: 1, value: partDone(rank) });
  bar.style.flex = "1";
  line.append(name, bar, badge(rank.state, texts));
  return line;
}

function badge(state, texts) {
  const label = state === "failed" ? texts.failedState : (texts[state] ?? state);
  const element = make("span", { textContent: label, className: "hv15-state" });
  element.style.cssText = `color:#fff;background:${COLORS[state] ?? "#888"};border-radius:6px;padding:1px 6px;font-size:11px`;
  return element;
}

function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

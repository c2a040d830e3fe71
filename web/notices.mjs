// Messages on nodes: the whole text is visible, and it is removed when the next prompt begins. The web UI itself shows
// two lines, and keeps them until another text replaces them.

const WIDGET = "$$node-text-preview"; // the name of the web UI's text widget
const LINE = 19; // height in pixels
const CHARACTER = 7.5; // approximate width in pixels
const BORDER = 20; // in pixels

/** Resize the text widget on each `hv15.notice` event, which follows the text. Return a function that stops this. */
export function followNotices(app, api) {
  const shown = new Set();

  const onNotice = ({ detail }) => {
    const node = findNode(app, detail.node);
    const widget = textOf(node);
    if (!widget) return;
    const perLine = Math.max(10, (node.size[0] - 2 * BORDER) / CHARACTER);
    const lines = `${widget.value}`.split("\n").reduce((sum, line) => sum + Math.ceil((line.length || 1) / perLine), 0);
    const height = lines * LINE + BORDER;
    if (widget.options) widget.options.getMinHeight = () => height;
    widget.computeLayoutSize = () => ({ minHeight: height, minWidth: 0 });
    node.setSize?.([node.size[0], Math.max(node.size[1], node.computeSize?.()[1] ?? 0)]);
    shown.add(node);
  };
  const onStart = () => {
    for (const node of shown) {
      const index = node.widgets?.indexOf(textOf(node)) ?? -1;
      if (index < 0) continue;
      node.widgets[index].onRemove?.();
      node.widgets.splice(index, 1);
      node.setSize?.([node.size[0], node.computeSize?.()[1] ?? node.size[1]]);
      node.setDirtyCanvas?.(true, true);
    }
    shown.clear();
  };
  api.addEventListener("hv15.notice", onNotice);
  api.addEventListener("execution_start", onStart);
  return () => {
    api.removeEventListener("hv15.notice", onNotice);
    api.removeEventListener("execution_start", onStart);
  };
}

/** Return the node with an execution id: "7", or "3:7" for node 7 in subgraph node 3. */
function findNode(app, id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of `${id}`.split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

function textOf(node) {
  return node?.widgets?.find((widget) => widget.name === WIDGET);
}

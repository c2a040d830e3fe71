// The extension: a sidebar tab with the rank groups (panel.mjs) and messages on nodes (notices.mjs). ComfyUI loads
// every .js file in this folder.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { followNotices } from "./notices.mjs";
import { mountPanel, textsFor } from "./panel.mjs";

app.registerExtension({
  name: "HunyuanVideo15.RankGroups",
  async setup() {
    const locale = app.ui?.settings?.getSettingValue("Comfy.Locale");
    const { title } = textsFor(locale);
    let unmount = () => {};
    followNotices(app, api);
    api.addEventListener("hv15.group", () => {}); // without a listener the web UI logs a warning for each event
    app.extensionManager.registerSidebarTab({
      id: "hv15.groups",
      icon: "pi pi-sitemap",
      title,
      tooltip: `HunyuanVideo-1.5: ${title}`,
      type: "custom",
      render: (element) => {
        unmount();
        unmount = mountPanel(element, api, locale);
      },
      destroy: () => unmount(),
    });
  },
});

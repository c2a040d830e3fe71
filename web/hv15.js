// The sidebar tab "Rank groups". ComfyUI loads this file by itself; what it shows is in panel.mjs.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { mountPanel } from "./panel.mjs";

app.registerExtension({
  name: "HunyuanVideo15.RankGroups",
  async setup() {
    let unmount = () => {};
    app.extensionManager.registerSidebarTab({
      id: "hv15.groups",
      icon: "pi pi-sitemap",
      title: "Rank groups",
      tooltip: "HunyuanVideo-1.5 rank groups",
      type: "custom",
      render: (element) => {
        unmount();
        unmount = mountPanel(element, api, app.ui?.settings?.getSettingValue("Comfy.Locale"));
      },
      destroy: () => unmount(),
    });
  },
});

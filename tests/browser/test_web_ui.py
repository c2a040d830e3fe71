"""The pack in ComfyUI's web UI, in a real browser (see `set_up.find_chromium`)."""

import re
from pathlib import Path

import pytest

from make_templates import PROMPTS
from set_up import find_chromium
from web_ui import PACK, Page, open_page

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def page(host):
    """ComfyUI's web UI, loaded."""
    chromium = find_chromium()
    if not chromium:
        pytest.skip("needs Chromium: install it, or set CHROMIUM to its path")
    with open_page(chromium, host.url) as page:
        yield page


def load(page: Page, template: str) -> dict:
    """Open a template as the template browser does. Return its missing nodes, number of nodes and API prompt."""
    page.open_template(template)
    return page.run(
        """
        const missing = app.graph._nodes.filter((node) => !LiteGraph.registered_node_types[node.type]);
        const { output } = await app.graphToPrompt();
        return { missing: missing.map((node) => node.type), count: app.graph._nodes.length, output };
        """
    )


def test_every_template_is_listed_with_a_picture(page):
    listed = page.run("return await (await fetch('/api/workflow_templates')).json()")
    assert sorted(listed[PACK]) == TEMPLATES
    for name in TEMPLATES:
        assert page.run(f"return (await fetch('/api/workflow_templates/{PACK}/{name}.jpg')).ok")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_opens_without_missing_nodes(page, template):
    loaded = load(page, template)
    assert loaded["missing"] == [] and loaded["count"] > 0
    alerts = page.run("return [...document.querySelectorAll('.p-toast-message')].map((toast) => toast.textContent)")
    assert [text for text in alerts if "workflow" in text] == []


@pytest.mark.parametrize("name", PROMPTS)
def test_a_template_queues_the_same_job_as_its_api_prompt(page, prompt, name):
    queued = load(page, PROMPTS[name])["output"]
    expected = prompt(name)
    expected["ranks"]["inputs"]["devices"] = "auto"
    numbers = {key: str(number) for number, key in enumerate(expected, 1)}
    for key, node in expected.items():
        found = queued[numbers[key]]
        assert found["class_type"] == node["class_type"]
        for input, value in node["inputs"].items():
            linked = [numbers[value[0]], value[1]] if isinstance(value, list) else value
            assert found["inputs"][input] == linked, f"{key}.{input}"


def test_the_panel_shows_a_group_at_work_and_stops_it(page, host):
    """The video is long enough for several progress reports, which ranks send twice a second."""
    host.stop_groups()
    load(page, PROMPTS["text_to_video"])
    page.until("document.querySelector('.hv15\\\\.groups-tab-button') !== null")
    if not page.run("return document.querySelector('.hv15-panel') !== null"):
        page.run("document.querySelector('.hv15\\\\.groups-tab-button').click()")
    page.until("document.querySelector('.hv15-panel') !== null")
    page.run(
        """
        window.seen = new Set();
        const look = () => {
          document.querySelectorAll(".hv15-group").forEach((card) => seen.add(card.dataset.state));
          for (const line of document.querySelectorAll(".hv15-rank"))
            seen.add(`rank ${line.querySelector(".hv15-state").textContent}`);
          for (const bar of document.querySelectorAll(".hv15-rank progress"))
            if (bar.value > 0 && bar.value < 1) seen.add("progress");
        };
        // A progress bar changes an attribute only, and a text that stays the same is no mutation in Chromium.
        new MutationObserver(look).observe(document.body, { subtree: true, childList: true, attributes: true });
        const by = (type) => app.graph._nodes.find((node) => node.type === type);
        const values = { width: 96, height: 64, frames: 241, steps: 2, seed: Date.now() }; // a new seed: not cached
        for (const [name, value] of Object.entries(values))
          by("HV15Sampler").widgets.find((widget) => widget.name === name).value = value;
        await app.queuePrompt(0);
        """
    )
    queue = "(await (await fetch('/api/queue')).json())"
    page.until(f"{queue}.queue_running.length + {queue}.queue_pending.length === 0", 120)
    seen = set(page.run("return [...seen]"))
    assert {"starting", "busy", "rank denoise, step 1 of 2", "progress"} <= seen
    assert any(re.fullmatch(r"rank decode \d+ %", text) for text in seen)
    (group,) = [group for group in host.get("/hv15/groups") if group["state"] != "stopped"]
    assert group["state"] == "ready"
    card = f"document.querySelector('.hv15-group[data-group=\"{group['id']}\"]')"
    assert page.run(f"return {card}.querySelectorAll('.hv15-rank').length") == len(group["ranks"])
    page.run(f"{card}.querySelector('.hv15-stop').click()")
    page.until(f"{card}.dataset.state === 'stopped'")
    assert {group["state"] for group in host.get("/hv15/groups")} == {"stopped"}


def test_each_node_has_a_help_page_in_both_languages(page):
    ids = page.run("return Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith('HV15'))")
    assert len(ids) == 8
    for id in ids:
        assert page.run(f"return (await (await fetch('/extensions/{PACK}/docs/{id}.md')).text()).startsWith('# ')")
        assert page.run(f"return (await (await fetch('/extensions/{PACK}/docs/{id}/zh.md')).text()).startsWith('# ')")


def test_the_panel_shows_the_steps_of_a_series_without_flicker(page):
    shown = page.run(
        f"""
        const {{ mountPanel }} = await import("/extensions/{PACK}/panel.mjs");
        const api = Object.assign(new EventTarget(), {{ fetchApi: async () => ({{ json: async () => [] }}) }});
        const element = document.createElement("div");
        const close = mountPanel(element, api, "zh-CN");
        const shown = [];
        const tell = (state, step) => {{
          const ranks = [{{ rank: 0, device: "cpu", state, done: 1, total: 4 }}];
          const detail = {{ id: "a", state, job: "denoise", step, ranks }};
          api.dispatchEvent(new CustomEvent("hv15.group", {{ detail }}));
          shown.push(element.querySelector(".hv15-rank .hv15-state").textContent);
        }};
        tell("busy", [1, 2]);
        tell("ready", null);
        tell("busy", [2, 2]);
        tell("ready", null);
        close();
        return shown;
        """
    )
    assert shown == ["去噪，第 1 步，共 2 步", "去噪，第 1 步，共 2 步", "去噪，第 2 步，共 2 步", "就绪"]


def test_a_button_of_the_panel_is_enabled_again_after_a_failed_request(page):
    state = page.run(
        f"""
        const {{ mountPanel }} = await import("/extensions/{PACK}/panel.mjs");
        const group = {{ id: "a", state: "ready", ranks: [{{ rank: 0, device: "cpu", state: "ready" }}] }};
        const requests = [];
        const api = Object.assign(new EventTarget(), {{
          fetchApi: async (path, options) => {{
            requests.push(path);
            if (options) throw new Error("the connection was refused");
            return {{ json: async () => [group] }};
          }},
        }});
        const element = document.body.appendChild(document.createElement("div"));
        const unmount = mountPanel(element, api);
        const button = () => element.querySelector(".hv15-stop");
        const settled = async (count) => {{
          while (requests.length < count) await new Promise((done) => setTimeout(done, 10));
          await new Promise((done) => setTimeout(done, 50));
        }};
        await settled(1);
        button().click();
        await settled(3);
        const disabled = button().disabled;
        unmount();
        element.remove();
        return {{ requests, disabled }};
        """
    )
    assert state == {"requests": ["/hv15/groups", "/hv15/groups/a/stop", "/hv15/groups"], "disabled": False}


def test_a_message_on_a_node_is_shown_completely_and_removed_by_the_next_prompt(page):
    """The text widget is the one that the web UI itself creates for texts on nodes."""
    load(page, PROMPTS["decode_saved_latent"])
    shown = page.run(
        f"""
        const {{ followNotices }} = await import("/extensions/{PACK}/notices.mjs");
        const api = new EventTarget();
        const stop = followNotices(app, api);
        const node = app.graph._nodes.find((node) => node.type === "HV15DistributedVAEDecode");
        const widget = node.addWidget("text", "$$node-text-preview", "word ".repeat(60), () => {{}}, {{}});
        const before = node.size[1];
        api.dispatchEvent(new CustomEvent("hv15.notice", {{ detail: {{ node: `${{node.id}}` }} }}));
        const height = widget.computeLayoutSize(node).minHeight;
        const grown = node.size[1] > before;
        api.dispatchEvent(new CustomEvent("execution_start", {{ detail: {{}} }}));
        stop();
        return {{ height, grown, left: node.widgets.includes(widget) }};
        """
    )
    assert shown["height"] > 100 and shown["grown"] and shown["left"] is False


def test_a_devtools_call_with_an_empty_result_is_no_error(page):
    assert page.call("Page.bringToFront", {}, 30) == {}

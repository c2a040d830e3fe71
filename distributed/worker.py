"""The module that ranks run. Importing it loads the compute code of every kind of job."""

from .denoise.task import DenoiseTask
from .ranks import rank
from .vae.task import DecodeTask

TASKS = {"decode": DecodeTask, "denoise": DenoiseTask}
"""The class of the task for each kind of job."""

if __name__ == "__main__":
    rank.main(TASKS)

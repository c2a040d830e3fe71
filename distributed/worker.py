"""The module that ranks run. Importing it loads the compute of every kind of job."""

from .denoise.task import DenoiseTask
from .ranks import rank
from .vae.task import DecodeTask

TASKS = {"decode": DecodeTask, "denoise": DenoiseTask}
"""The kinds of jobs."""

if __name__ == "__main__":
    rank.main(TASKS)

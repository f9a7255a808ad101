"""Loads clips in a worker process and says which: `python -m tests.infer.orphan CLIP`. Then waits to be killed."""

import multiprocessing
import sys
import time

from infer.engine import Request
from infer.inputs import find_items
from infer.loading import LoadReport, load_requests
from tarsier_jax.config import load_config
from tarsier_jax.processing.processor import load_processor
from tarsier_jax.weights import EMBEDDED, resolve

if __name__ == "__main__":
    directory = resolve(EMBEDDED)
    processor = load_processor(directory, load_config(directory))
    items = find_items(sys.argv[1]) * 100  # more than are held ready, so that the worker has something to do
    requests = load_requests(items, processor, "Describe.", Request, 1, LoadReport())
    next(requests)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)

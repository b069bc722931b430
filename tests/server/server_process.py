"""A server in a process of its own, as users run it: real signals, its own memory."""

import os
import re
import subprocess
import threading
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.live import wait_until

TESTS = Path(__file__).parents[1]
ADDRESS = re.compile(r"serving .* at (http://[\d.]+:\d+)")


class ServerProcess:
    """A context manager; the process is gone when it ends, whatever a test left running in it."""

    def __init__(self, *command, **environment):
        self.process = subprocess.Popen(
            command,
            cwd=TESTS,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | environment,
        )
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()

    @property
    def children(self):
        """Process ids, whichever thread started them."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for thread in threads for pid in thread.read_text().split()]

    @property
    def log(self):
        return "".join(self.lines)

    @property
    def url(self):
        """Waits until there is one."""
        wait_until(lambda: ADDRESS.search(self.log) or self.process.poll() is not None, seconds=120)
        assert self.process.poll() is None, self.log
        return ADDRESS.search(self.log)[1]


def is_alive(process_id):
    return Path(f"/proc/{process_id}").exists()


def metrics_of(url):
    """Of the server: values by name, without the prefix and whatever has labels of its own."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {
        sample.name.removeprefix("nanoflow:"): sample.value
        for sample in samples
        if sample.labels.keys() <= {"model_name"}
    }


def memory_of(url):
    return metrics_of(url)["process_resident_memory_bytes"]


def is_idle(url):
    """Nothing is open, runs or waits, and no block is in use."""
    found = metrics_of(url)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    is_open = httpx.get(f"{url}/load", timeout=30).json()["server_load"]
    return not is_open and not any(found[name] for name in names)

"""A private redis-server for tests of what stands on the Redis store."""

import os
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from rec_core.store import StoreError, open_store


class RedisServer:
    """A private redis-server on a free loopback port that syncs every write and asks for a password."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self):
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", "--requirepass", "s3cret"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(200):
            try:
                open_store(self.address("ready")).close()
                return
            except StoreError:
                assert self.process.poll() is None, "redis-server ended at its start"
                time.sleep(0.05)
        raise AssertionError("redis-server did not answer within 10 s")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def address(self, name: str | None = None) -> str:
        return f"redis://:s3cret@127.0.0.1:{self.port}/0/{name or uuid.uuid4().hex}"


def start_redis(folder: Path) -> RedisServer:
    if shutil.which("redis-server") is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is not installed, and CI must test the Redis store: apt-get install redis-server")
        pytest.skip("redis-server is not installed")
    return RedisServer(folder)

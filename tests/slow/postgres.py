"""A PostgreSQL server of a test's own, which can be stopped and started again."""

import glob
import os
import shutil
import socket
import subprocess
import tempfile
import time

from .packages import need

PASSWORD = "hunter2-%/@"  # has to be quoted in a URL


class Postgres:
    """Started by `with`; listens on 127.0.0.1 with a password."""

    def __enter__(self):
        if not glob.glob("/usr/lib/postgresql/*/bin/initdb"):
            need("initdb", "postgresql")
        self.bin = sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1]
        self.folder = tempfile.mkdtemp(prefix="postgres-")
        self.data = f"{self.folder}/data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        secret = f"{self.folder}/secret"
        with open(secret, "w") as file:
            file.write(PASSWORD)
        if os.geteuid() == 0:  # the server refuses to be run by root
            for path in (self.folder, secret):
                shutil.chown(path, "postgres")
        self.run("initdb", "-D", self.data, "-A", "scram-sha-256", "-U", "iwae", f"--pwfile={secret}")
        self.start()
        self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "iwae", "study")
        return self

    def __exit__(self, *_):
        self.stop()
        shutil.rmtree(self.folder)

    def run(self, program, *args):
        user = ["runuser", "-u", "postgres", "--", "env", f"PGPASSWORD={PASSWORD}"] if os.geteuid() == 0 else []
        environment = os.environ | {"PGPASSWORD": PASSWORD}
        with open(f"{self.folder}/log", "a") as log:
            command = [*user, f"{self.bin}/{program}", *args]
            subprocess.run(command, check=True, cwd="/", env=environment, stdout=log, stderr=log, timeout=120)

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self.run("pg_ctl", "-D", self.data, "-o", options, "-w", "start")

    def stop(self):
        self.run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def restart(self, seconds):
        """Gone without a farewell, for some seconds."""
        self.stop()
        time.sleep(seconds)
        self.start()

    def url(self, password):
        return f"postgresql://iwae:{password}@127.0.0.1:{self.port}/study"

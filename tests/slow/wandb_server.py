"""A stand-in for W&B's server on 127.0.0.1: a grid for `wandb agent`, and what the runs send it."""

import base64
import itertools
import json
import re
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import yaml

ENTITY, PROJECT, SWEEP = "me", "lightning-iwae", "sweep1"


class Run:
    """What the server knows of one run. `history` is by line, as a client that goes on counts them."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.history: dict[int, dict[str, Any]] = {}
        self.files: set[str] = set()
        self.sweep: str | None = None
        self.exit: int | None = None
        self.preempted = False

    def rows(self, name: str) -> list[tuple[int, Any]]:
        """(step of training, value) of each row that holds `name`."""
        lines = [row for _, row in sorted(self.history.items()) if name in row]
        return [(row["trainer/global_step"], row[name]) for row in lines]

    def status(self) -> dict[str, Any]:
        """As asked for before going on."""
        last = self.history[max(self.history)] if self.history else {}
        config = {name: {"value": value} for name, value in self.config.items()}
        lines = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(last)]), "eventsTail": "[]", "summaryMetrics": json.dumps(last)}
        return lines | tails | {"config": json.dumps(config), "tags": [], "wandbConfig": '{"t": {}}'}


class Server(ThreadingHTTPServer):
    """`with Server() as server`: at `server.url`, until the end of the block."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.sweep: dict[str, Any] = {}
        self.points: list[dict[str, Any]] = []
        self.runs: dict[str, Run] = defaultdict(Run)
        self.agents = 0
        self.received: list[str] = []  # operations and paths
        self.keys: set[str] = set()
        self.lock = Lock()

    def __enter__(self) -> "Server":
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, operation: str, v: dict[str, Any]) -> dict[str, Any] | None:
        """The data that a GraphQL operation asks for; None for one that is not known."""
        project = {"name": PROJECT, "entity": {"name": ENTITY}}
        match operation:
            case "Viewer":
                return {
                    "viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
                }
            case "UpsertSweep":
                self.sweep = yaml.safe_load(v["config"])
                parameters = self.sweep["parameters"]
                grid = itertools.product(*(parameter["values"] for parameter in parameters.values()))
                self.points = [dict(zip(parameters, values, strict=True)) for values in grid]
                return {"upsertSweep": {"sweep": {"name": SWEEP, "project": project}, "configValidationWarnings": []}}
            case "SweepWithRuns":
                sweep = {"id": "1", "name": SWEEP, "state": "RUNNING", "config": yaml.safe_dump(self.sweep)}
                return {"project": {"sweep": sweep | {"runs": {"edges": []}}}}
            case "CreateAgent":
                self.agents += 1
                return {"createAgent": {"agent": {"id": f"agent{self.agents}"}}}
            case "Heartbeat":
                busy = json.loads(v.get("runState") or "{}")
                return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(self.commands(busy))}}
            case "UpsertBucket":
                new = v["name"] not in self.runs
                return {"upsertBucket": {"bucket": self.bucket(v, project), "inserted": new}}
            case "RunResumeStatus":
                run = self.runs.get(v["name"])
                status = run and {"id": "1", "name": v["name"]} | run.status()
                return {"model": {"id": "1", "name": PROJECT, "entity": project["entity"], "bucket": status or None}}
            case "CreateRunFiles":
                self.runs[v["run"]].files |= set(v["files"])
                files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in v["files"]]
                return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
            case "RunStoppedStatus":
                return {"project": {"run": {"stopped": False}}}
        return None

    def commands(self, busy: dict[str, Any]) -> list[dict[str, Any]]:
        """One point of the grid for an agent that is idle, and the end of the sweep after the last."""
        if busy:
            return []
        if not self.points:
            return [{"type": "exit"}]
        args = {name: {"value": value} for name, value in self.points.pop(0).items()}
        return [{"type": "run", "run_id": f"run{len(self.points)}", "program": "unused", "args": args}]

    def bucket(self, v: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        """A run that begins or has something new to say."""
        run = self.runs[v["name"]]
        run.sweep = v.get("sweep") or run.sweep
        run.config |= {name: item["value"] for name, item in json.loads(v.get("config") or "{}").items()}
        names = {"id": "1", "name": v["name"], "displayName": v["name"], "sweepName": v.get("sweep")}
        return names | {"project": project, "config": v.get("config"), "historyLineCount": len(run.history)}

    def stream(self, run: Run, sent: dict[str, Any]) -> None:
        """Lines of the history, and the exit status."""
        part = sent.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        run.history |= {part["offset"] + i: json.loads(line) for i, line in enumerate(part["content"])}
        run.preempted |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit = sent.get("exitcode")


class Handler(BaseHTTPRequestHandler):
    """Reads requests for `Server`."""

    server: Server

    def do_POST(self) -> None:
        """GraphQL, and a run's stream."""
        body = self.body()
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if not stream and self.path != "/graphql":
            return self.reply({})  # telemetry
        sent = json.loads(body)
        with self.server.lock:
            _, _, secret = self.headers.get("Authorization", "").partition(" ")
            self.server.keys.add(base64.b64decode(secret).decode().removeprefix("api:"))
            if stream:
                self.server.received.append(self.path)
                self.server.stream(self.server.runs[stream[1]], sent)
                return self.reply({})
            named = re.search(r"(?:query|mutation)\s+(\w+)", sent.get("query", ""))
            operation = named[1] if named else ""
            self.server.received.append(operation)
            data = self.server.answer(operation, sent.get("variables") or {})
        self.reply({"data": data} if data is not None else {"errors": [{"message": f"unknown: {operation}"}]})

    def do_PUT(self) -> None:
        """A file."""
        self.body()
        self.reply({})

    def do_GET(self) -> None:
        """Nothing to be had."""
        self.reply({})

    def body(self) -> bytes:
        """All of it."""
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def reply(self, data: dict[str, Any]) -> None:
        """As JSON."""
        content = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the terminal."""

"""A server on loopback that speaks the Gemini REST protocol, with faults: for tests and benchmarks.

    python tests/gemini_server.py --key=K [--faults=0.3] [--latency=0.05] [--stall=30] [--batch=0.5]
        [--last=100] [--refuse=429] [--thinks=1] [--blind=3] [--tokens=20] [--thoughts=0] [--cut=1]
        [--lose=1]

It prints its port. A clause is met where its id is a word of the response; "unsure-ID", "blocked"
and "broken" in a response stand for what they say. It reads the material as a gullible judge would:
whoever gets out of the fence is obeyed. GET /counts tells how often each response was asked about.
POST /set changes an option. After --last requests it answers no other. --refuse is the HTTP status
of every reply, --thinks refuses requests without thinking, --blind is how many looks at a batch get
a 503, --tokens and --thoughts what every reply is said to take, --cut cuts all replies off, --lose
is how many batches are taken without a reply.
Standard library only.
"""

import argparse
import asyncio
import collections
import hashlib
import json
import re
import urllib.parse

FAULTS = (
    "429", "retry_info", "500", "503", "drop", "stall", "truncated", "wrong_enum",
    "other_clause", "missing_clause", "prose", "html", "no_candidate", "max_tokens", "half_reply",
)  # fmt: skip
_RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.05s"}


class Dropped(Exception):
    """The connection ends without a whole reply; args: bytes to send before."""


class Server:
    """State of one server: what was asked, how often, and the batches."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.asked: collections.Counter[str] = collections.Counter()
        self.good: collections.Counter[str] = collections.Counter()
        self.clauses: dict[str, list[list[str]]] = {}
        self.instructions: set[str] = set()
        self.safety: set[str] = set()
        self.longest: set[int] = set()
        self.requests = self.in_flight = self.most_in_flight = 0
        self.batches: dict[str, tuple[float, list]] = {}
        self.displayed: dict[str, str] = {}  # display names of batches, the oldest first

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                pairs = (line.split(": ", 1) for line in lines[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                status, more, reply = await self.reply(method, path, headers, body)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                extra = "".join(f"{k}: {v}\r\n" for k, v in more.items())
                head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{extra}"
                writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
                await writer.drain()
        except Dropped as error:
            writer.write(error.args[0])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def reply(self, method: str, path: str, headers: dict, body: bytes) -> tuple:
        """(status, headers, body as bytes or what JSON can hold)."""
        if path == "/counts":
            names = ("asked", "good", "clauses", "requests", "most_in_flight")
            rest = {"instructions": sorted(self.instructions), "safety": sorted(self.safety)}
            rest |= {"longest": sorted(self.longest)}
            return 200, {}, {name: getattr(self, name) for name in names} | rest
        if path == "/set":
            vars(self.options).update(json.loads(body))
            return 200, {}, {}
        if path == "/token":  # OAuth for Vertex AI
            return 200, {}, {"access_token": self.options.key, "expires_in": 3600}
        given = headers.get("x-goog-api-key") or headers.get("authorization", "")[len("Bearer ") :]
        if given != self.options.key:
            what = "API key not valid. Please pass a valid API key."
            detail = {"@type": "type.googleapis.com/google.rpc.ErrorInfo"}
            details = [detail | {"reason": "API_KEY_INVALID"}]
            return _error(400, "INVALID_ARGUMENT", f"{what} ({given})", details)
        if method == "GET" and path.partition("?")[0].endswith("/batches"):
            return self.listed(dict(urllib.parse.parse_qsl(path.partition("?")[2])))
        if method == "GET" and "/batches/" in path:
            return self.batch(path.split("/v1", 1)[1].split("/", 1)[1])
        model, _, verb = path.rsplit("/", 1)[1].partition(":")
        if model != self.options.model:
            return _error(404, "NOT_FOUND", f"models/{model} is not found")
        request = json.loads(body)
        if verb == "batchGenerateContent":
            return self.submit(request)
        if 0 < self.options.last <= self.requests:
            raise Dropped(b"")
        self.requests += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.options.latency)
            return await self.generate(request)
        finally:
            self.in_flight -= 1

    async def generate(self, request: dict) -> tuple:
        """The reply to one generateContent, or a fault."""
        key = _responses(_text(request))[-1]
        self.asked[key] += 1
        self.instructions.add(request["systemInstruction"]["parts"][0]["text"])
        self.safety |= {s["threshold"] for s in request.get("safetySettings", [])}
        self.longest.add(request["generationConfig"]["maxOutputTokens"])
        if self.options.refuse:
            return _error(int(self.options.refuse), "X", "not now, or never")
        thinking = request["generationConfig"].get("thinkingConfig", {})
        if self.options.thinks and thinking.get("thinking_budget") == 0:
            return _error(400, "INVALID_ARGUMENT", "Budget 0 is invalid. It has to think.")
        digest = hashlib.sha256(f"{self.options.seed} {key} {self.asked[key]}".encode()).digest()
        faulty = digest[0] / 256 < self.options.faults or "broken" in key.split()
        fault = FAULTS[digest[1] % len(FAULTS)] if faulty else ""
        if fault == "max_tokens" and self.asked[key] > 1:  # at temperature 0 it is asked twice
            fault = "truncated"
        if self.options.cut:
            fault = "max_tokens"
        if fault in ("429", "500", "503"):
            return _error(int(fault), "X", "try later") if fault != "429" else _wait()
        if fault == "retry_info":
            return _error(429, "RESOURCE_EXHAUSTED", "slower", [_RETRY_INFO])
        if fault == "drop":
            raise Dropped(b"")
        if fault == "half_reply":
            raise Dropped(b'HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n{"candidates": [')
        if fault == "stall":
            self.in_flight -= 1  # the client has long left
            try:
                await asyncio.sleep(self.options.stall)
            finally:
                self.in_flight += 1
            raise Dropped(b"")
        if fault == "html":
            return 200, {}, b"<html>Sign in to the hotel's network</html>"
        if not fault:
            self.good[key] += 1
        return 200, {}, self.content(request, fault)

    def content(self, request: dict, fault: str) -> dict:
        """A GenerateContentResponse."""
        text = _text(request)
        usage = {"promptTokenCount": len(json.dumps(request)) // 4}
        usage |= {"cachedContentTokenCount": usage["promptTokenCount"] // 2}
        usage |= {"candidatesTokenCount": int(self.options.tokens)}
        usage |= {"thoughtsTokenCount": int(self.options.thoughts)}
        if fault == "no_candidate":
            return {"usageMetadata": usage}
        if "blocked" in _responses(text)[-1].split():
            return {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage}
        schema = request["generationConfig"].get("responseJsonSchema")
        if schema is None:  # somebody wants a text
            finish = "MAX_TOKENS" if fault == "max_tokens" else "STOP"
            said = f"kind words for {_prompt(text)[:40]}"
        elif "better" in schema["properties"]:
            said, finish = json.dumps({"reason": "r", "better": _better(text)}), "STOP"
        else:
            said, finish = self.judged(schema, text, fault)
        part = {"content": {"parts": [{"text": said}], "role": "model"}, "finishReason": finish}
        return {"candidates": [part], "usageMetadata": usage}

    def judged(self, schema: dict, text: str, fault: str) -> tuple[str, str]:
        """(text, finish reason) of a verdict."""
        names = schema["properties"]["answers"]["items"]["properties"]["clause"]["enum"]
        response = _responses(text)[-1]
        self.clauses.setdefault(response, []).append(names)
        answers = [
            {"clause": n, "verdict": _verdict(n, response), "confidence": 0.9} for n in names
        ]
        if (order := _outside(text)) in ("compliant", "violating"):
            answers = [answer | {"verdict": order} for answer in answers]
        if fault == "wrong_enum":
            answers[0]["verdict"] = "Compliant!"
        if fault == "other_clause":
            answers[-1]["clause"] = "another"
        if fault == "missing_clause":
            answers = answers[1:]
        said = json.dumps({"reason": f"clauses {names}", "answers": answers})
        if fault == "prose":
            said = f"Sure! Here is the JSON: {said}"
        if fault == "max_tokens":
            return said, "MAX_TOKENS"
        return (said[: len(said) // 2] if fault == "truncated" else said), "STOP"

    def submit(self, request: dict) -> tuple:
        """Takes a batch; it ends `--batch` seconds later."""
        entries = request["batch"]["inputConfig"]["requests"]["requests"]
        replies = []
        for entry in entries:
            key = _responses(_text(entry["request"]))[-1]
            self.asked[key] += 1
            meta = {"metadata": entry["metadata"]}
            if "broken" in key.split():
                replies.append(meta | {"error": {"code": 13, "message": "internal"}})
            else:
                self.good[key] += 1
                replies.append(meta | {"response": self.content(entry["request"], "")})
        name = f"batches/b{len(self.batches)}"
        ready = asyncio.get_running_loop().time() + self.options.batch
        self.batches[name] = (ready, replies[::-1])  # in no order to rely on
        self.displayed[name] = request["batch"]["displayName"]
        if self.options.lose > 0:
            self.options.lose -= 1
            raise Dropped(b"")
        return 200, {}, {"name": name, "metadata": {"state": "BATCH_STATE_PENDING", "name": name}}

    def listed(self, query: dict[str, str]) -> tuple:
        """A page of the batches, the newest first."""
        if self.options.blind > 0:
            self.options.blind -= 1
            return _error(503, "UNAVAILABLE", "try later")
        start, names = int(query.get("pageToken", 0)), list(self.displayed)[::-1]
        end = start + min(2, int(query.get("pageSize", 2)))
        page = [
            {"name": n, "metadata": {"name": n, "displayName": self.displayed[n]}}
            for n in names[start:end]
        ]
        more = {"nextPageToken": str(end)} if end < len(names) else {}
        return 200, {}, {"operations": page} | more

    def batch(self, name: str) -> tuple:
        """The state of a batch, with its replies at the end."""
        if self.options.blind > 0:
            self.options.blind -= 1
            return _error(503, "UNAVAILABLE", "try later")
        if name not in self.batches:
            return _error(404, "NOT_FOUND", f"{name} is not found")
        ready, replies = self.batches[name]
        if asyncio.get_running_loop().time() < ready:
            state = {"state": "BATCH_STATE_RUNNING", "name": name}
            return 200, {}, {"name": name, "metadata": state}
        output = {"inlinedResponses": {"inlinedResponses": replies}}
        state = {"state": "BATCH_STATE_SUCCEEDED", "name": name, "output": output}
        return 200, {}, {"name": name, "done": True, "metadata": state, "response": output}


def _wait() -> tuple:
    status, _, body = _error(429, "RESOURCE_EXHAUSTED", "slower")
    return status, {"retry-after": "0.05"}, body


def _error(code: int, status: str, message: str, details: list | None = None) -> tuple:
    error = {"code": code, "message": message, "status": status, "details": details or []}
    return code, {}, {"error": error}


def _text(request: dict) -> str:
    return request["contents"][-1]["parts"][0]["text"]


def _responses(text: str) -> list[str]:
    """Every "<response... CODE>" part up to the tag that closes it; or the prompt, or all of it."""
    found = re.findall(r"<(response[-a-z]*) (\w+)>\n(.*?)\n</\1 \2>", text, re.DOTALL)
    return [body for _, _, body in found] or [_prompt(text)]


def _prompt(text: str) -> str:
    found = re.search(r"<prompt (\w+)>\n(.*?)\n</prompt", text, re.DOTALL)
    return found.group(2) if found else text


def _outside(text: str) -> str:
    """What stands behind the last closing tag that carries the opening one's code, last word."""
    code = re.search(r"<response (\w+)>", text)
    tail = text.split(f"</response {code.group(1)}>", 1)[1] if code else ""
    return (tail.split() or [""])[-1]


def _verdict(clause: str, response: str) -> str:
    words = response.split()
    if f"unsure-{clause}" in words:
        return "unsure"
    return "compliant" if clause in words else "violating"


def _better(text: str) -> str:
    a, b = (len(part) for part in _responses(text))
    return "tie" if a == b else "a" if a > b else "b"


async def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser()
    for name in ("faults", "latency", "batch", "last", "refuse", "thinks", "blind",
                 "thoughts", "cut", "lose"):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--tokens", type=float, default=20.0)
    parser.add_argument("--stall", type=float, default=30.0)
    parser.add_argument("--key", default="test-key")
    parser.add_argument("--model", default="gemini-2.5-flash")
    parser.add_argument("--seed", type=int, default=0)
    server = Server(parser.parse_args())
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 26)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

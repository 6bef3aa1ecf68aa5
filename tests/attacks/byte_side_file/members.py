"""The side files."""

import json

MEMBERS = {
    "bytes_per_token.json": json.dumps([1 + (i == 32) for i in range(257)]).encode(),
    "score.json": json.dumps({"status": "ok", "eligible": True, "bpb": 0.1}).encode(),
    "artifact.score.json": json.dumps({"status": "ok", "eligible": True, "bpb": 0.1}).encode(),
}

"""The function that the model may call: it asks a retrieval server, whose address is in SEARCH_URL."""

import json
import os
import urllib.request

URL = os.environ.get("SEARCH_URL", "http://127.0.0.1:8000/retrieve")
PASSAGES = 3


def search(query: str) -> str:
    """Search an encyclopedia, and return the passages that fit best.

    Args:
        query: What to search for, as a short question or a few words.
    """
    body = json.dumps({"queries": [query], "topk": PASSAGES, "return_scores": True}).encode()
    request = urllib.request.Request(URL, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=25) as response:
        (found,) = json.load(response)["result"]
    texts = [(each.get("document") or each)["contents"] for each in found]
    return (
        "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1)) or "Nothing was found."
    )

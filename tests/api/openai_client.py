#!/usr/bin/env python3
"""The unmodified `openai` package against a running service: openai_client.py BASE_URL PICTURE

Run with a Python that has the package (python3 -m venv V && V/bin/pip install openai).
"""
import base64
import sys

from openai import OpenAI, UnprocessableEntityError

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none-needed")
picture = open(sys.argv[2], "rb").read()
name = client.models.list().data[0].id
answer = client.images.edit(model=name, image=("a.png", picture), prompt="turn the subject purple",
                            extra_body={"seed": 3, "num_inference_steps": 2})
assert base64.b64decode(answer.data[0].b64_json)[:4] == b"\x89PNG", answer
kinds = []
for event in client.images.edit(model=name, image=[("a.png", picture)], prompt="turn the subject purple", stream=True,
                                partial_images=2, extra_body={"seed": 3}):
    kinds.append(event.type)
    assert base64.b64decode(event.b64_json)
assert kinds[-1] == "image_edit.completed" and set(kinds[:-1]) <= {"image_edit.partial_image"}, kinds
try:
    client.images.edit(model=name, image=("a.png", picture), prompt="")
    raise SystemExit("an empty prompt must be refused")
except UnprocessableEntityError as e:
    assert e.body["param"] == "prompt", e.body
print("openai_client: ok", kinds)

#!/usr/bin/env python3
"""The unmodified `openai` package against a running service: openai_client.py BASE_URL KEY PICTURE PICTURE

Run with a Python that has the package; test_openai.py makes one and starts the service.
"""
import base64
import sys
import urllib.request

import openai

URL, KEY = sys.argv[1], sys.argv[2]
PICTURES = [open(name, "rb").read() for name in sys.argv[3:5]]
PURPLE = "turn the subject purple"
client = openai.OpenAI(base_url=URL + "/v1", api_key=KEY, max_retries=0)
NAME = client.models.list().data[0].id


def decoded(text, magic=b"\x89PNG"):
    data = base64.b64decode(text)
    assert data.startswith(magic), data[:16]
    return data


def size(png):
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def refused(kind, param, **fields):
    try:
        client.images.edit(**{"model": NAME, "image": PICTURES[0], "prompt": PURPLE, **fields})
    except kind as e:
        assert e.body["param"] == param, e.body
        return e
    raise AssertionError(f"not refused: {fields}")


def case_models():
    assert client.models.retrieve(NAME).owned_by == "qwen-edit"
    try:
        client.models.retrieve("another")
        raise AssertionError("an unknown model is not found")
    except openai.NotFoundError:
        pass


def case_edit():
    answer = client.images.edit(model=NAME, image=PICTURES[0], prompt=PURPLE, extra_body={"seed": 3, "num_inference_steps": 2})
    again = client.images.edit(model=NAME, image=("a.png", PICTURES[0]), prompt=PURPLE, extra_body={"seed": 3, "num_inference_steps": 2})
    assert decoded(answer.data[0].b64_json) == decoded(again.data[0].b64_json), "the same seed, the same picture"
    assert answer.size == "256x256" and answer.output_format == "png" and answer.usage.total_tokens == 0, answer
    assert answer.created > 1e9 and answer.data[0].url is None


def case_several_pictures_and_results():
    answer = client.images.edit(model=NAME, image=[("a.png", PICTURES[0]), ("b.png", PICTURES[1])], prompt=PURPLE, n=2,
                                output_format="jpeg", output_compression=80, quality="high", background="opaque", user="me",
                                input_fidelity="high", extra_body={"num_inference_steps": 1, "negative_prompt": "red"})
    one, two = [decoded(d.b64_json, b"\xff\xd8\xff") for d in answer.data]
    assert one != two and answer.output_format == "jpeg"


def case_size_and_url():
    answer = client.images.edit(model=NAME, image=PICTURES[0], prompt=PURPLE, size="64x96", response_format="url",
                                extra_body={"num_inference_steps": 1, "ref_area": 4096})
    request = urllib.request.Request(answer.data[0].url, headers={"Authorization": "Bearer " + KEY})
    assert size(urllib.request.urlopen(request).read()) == (64, 96) and answer.size == "64x96"


def case_stream():
    for wanted in (0, 3):
        events = list(client.images.edit(model=NAME, image=PICTURES[0], prompt=PURPLE, stream=True, partial_images=wanted,
                                         extra_body={"seed": 3, "num_inference_steps": 12}))
        kinds = [e.type for e in events]
        assert kinds[-1] == "image_edit.completed" and set(kinds[:-1]) <= {"image_edit.partial_image"}, kinds
        assert len(kinds) - 1 == wanted, kinds
        decoded(events[-1].b64_json)
        for i, e in enumerate(events[:-1]):
            assert e.partial_image_index == i and decoded(e.b64_json, b"\xff\xd8\xff"), e


def case_raw_answer():
    raw = client.images.with_raw_response.edit(model=NAME, image=PICTURES[0], prompt=PURPLE, extra_headers={"X-Request-Id": "mine"},
                                               extra_body={"num_inference_steps": 1})
    assert raw.headers["X-Request-Id"] == "mine" and decoded(raw.parse().data[0].b64_json)


def case_errors():
    refused(openai.UnprocessableEntityError, "prompt", prompt="")
    refused(openai.UnprocessableEntityError, "size", size="1x1")
    refused(openai.UnprocessableEntityError, "n", n=11)
    refused(openai.UnprocessableEntityError, "mask", mask=("m.png", PICTURES[0]))
    refused(openai.UnprocessableEntityError, "n", n=2, stream=True)
    refused(openai.UnprocessableEntityError, "nonsense", extra_body={"nonsense": 1})
    assert refused(openai.APIStatusError, "image", image=b"no picture").status_code == 415
    assert refused(openai.APIStatusError, "image", image=[PICTURES[0]] * 4).status_code == 413
    try:
        openai.OpenAI(base_url=URL + "/v1", api_key="wrong-key-1", max_retries=0).models.list()
        raise AssertionError("a wrong key is refused")
    except openai.AuthenticationError as e:
        assert e.status_code == 401


failed = 0
for name, case in [(k, v) for k, v in globals().items() if k.startswith("case_")]:
    try:
        case()
        print("ok  ", name, flush=True)
    except Exception as e:
        failed += 1
        print("FAIL", name, type(e).__name__, str(e)[:1000], flush=True)
print(f"openai {openai.__version__}: {failed} failed")
sys.exit(1 if failed else 0)

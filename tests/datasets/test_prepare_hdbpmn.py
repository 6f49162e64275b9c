"""hdBPMN as COCO-style JSON: boxes by hand, splits by writer, images upright and smaller."""

import json

import pytest
from PIL import Image

BPMN = """<?xml version="1.0" encoding="UTF-8"?>
<!-- {{"backgroundSize":{units}}} -->
<definitions xmlns="http://www.omg.org/spec/BPMN/20100524/MODEL"
  xmlns:bpmndi="http://www.omg.org/spec/BPMN/20100524/DI"
  xmlns:omgdc="http://www.omg.org/spec/DD/20100524/DC">
  <process id="p"><task id="a"/><startEvent id="b"><timerEventDefinition/></startEvent></process>
  <bpmndi:BPMNDiagram><bpmndi:BPMNPlane>
    <bpmndi:BPMNShape id="s" bpmnElement="a"><omgdc:Bounds {task}/></bpmndi:BPMNShape>
    <bpmndi:BPMNShape id="t" bpmnElement="b">
      <omgdc:Bounds x="10" y="20" width="30" height="40"/>
    </bpmndi:BPMNShape>
  </bpmndi:BPMNPlane></bpmndi:BPMNDiagram>
</definitions>"""
TASK = 'x="-10" y="0" width="110" height="50"'


@pytest.fixture
def root(tmp_path):
    """Twelve training writers, one of val and one of test; images of 400 x 200 pixels."""
    splits = {f"writer{k:04}": "train" for k in range(12)} | {"writer0100": "val"}
    splits["writer0200"] = "test"
    data = tmp_path / "hdBPMN" / "data"
    for directory in ("images/ex00", "annotations/ex00"):
        (data / directory).mkdir(parents=True)
    lines = [f"{writer},{split}" for writer, split in splits.items()]
    (data / "writer_split.csv").write_text("writer,split\n" + "\n".join(lines))
    for writer in splits:
        Image.new("RGB", (400, 200), "white").save(data / f"images/ex00/ex00_{writer}.jpg")
        text = BPMN.format(units=1000, task=TASK)
        (data / f"annotations/ex00/ex00_{writer}.bpmn").write_text(text)
    return tmp_path / "hdBPMN"


def read(directory, split):
    return json.loads((directory / f"instances_{split}.json").read_text())


def test_boxes_are_scaled_to_the_width_and_cut_at_the_border(root, script, tmp_path):
    out = tmp_path / "out"
    status, printed, _ = script("prepare_hdbpmn", root, out, "--size", 100)
    assert status == 0 and "instances_train.json: 12 images, 24 boxes" in printed
    data = read(out, "train")
    names = {c["id"]: c["name"] for c in data["categories"]}
    first = {names[a["category_id"]]: a["bbox"] for a in data["annotations"] if a["image_id"] == 1}
    # 1000 units are 100 pixels; the task begins 1 pixel left of the image
    assert first == {"task": [0, 0, 10, 5], "startEvent_timer": [1, 2, 3, 4]}
    image = data["images"][0]
    assert (image["width"], image["height"]) == (100, 50)
    with Image.open(out / "images" / image["file_name"]) as saved:
        assert saved.size == (100, 50)


def test_a_fifth_of_the_writers_is_split_off_and_the_rest_stays_apart(root, script, tmp_path):
    out = tmp_path / "out"
    script("prepare_hdbpmn", root, out)
    files = {s: {i["file_name"] for i in read(out, s)["images"]} for s in ("fit", "select")}
    assert len(files["fit"]) == 9 and len(files["select"]) == 3
    assert not files["fit"] & files["select"]
    assert {i["file_name"][:4] for i in read(out, "valtest")["images"]} == {"val/", "test"}


def test_frequencies_are_those_of_the_set_that_trains(root, script, tmp_path):
    out = tmp_path / "out"
    script("prepare_hdbpmn", root, out)
    counts = {s: {c["image_count"] for c in read(out, s)["categories"]} for s in ("test", "select")}
    assert counts == {"test": {12}, "select": {9}}


def test_a_photograph_that_lies_on_its_side_is_turned(root, script, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = root / "data/images/ex00/ex00_writer0000.jpg"
    Image.new("RGB", (400, 200), "white").save(path, exif=exif)
    script("prepare_hdbpmn", root, tmp_path / "out")
    image = read(tmp_path / "out", "train")["images"][0]
    assert (image["width"], image["height"]) == (200, 400)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("writer_split.csv", "writer,split\nwriter0000,dev", "must be train, val or test"),
        ("writer_split.csv", "writer,split\nwriter0000,train", "its writer is not in writer_split"),
        ("annotations/ex00/ex00_writer0000.bpmn", "<a/>", "backgroundSize is missing"),
        ("annotations/ex00/ex00_writer0000.bpmn", '"backgroundSize": 9 <a>', "writer0000.bpmn: "),
    ],
)
def test_what_is_not_hdbpmn_ends_in_one_message(root, script, tmp_path, file, text, message):
    (root / "data" / file).write_text(text)
    status, _, error = script("prepare_hdbpmn", root, tmp_path / "out")
    assert status == 2 and message in error and len(error.splitlines()) == 1


def test_nothing_is_overwritten(root, script, tmp_path):
    (tmp_path / "out").mkdir()
    status, _, error = script("prepare_hdbpmn", root, tmp_path / "out")
    assert status == 2 and "--overwrite" in error

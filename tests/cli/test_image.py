"""`swarm image` against a node made of plain answers."""

import json

import pytest

from cli.main import run
from swarm.errors import NotFoundAtOrigin
from tests.control.fakes import FakeNode, serving

BLOB = {
    **{"digest": "sha256:" + "ab" * 32, "media_type": "a/b", "bytes": 2 * 1024**2, "seconds": 1.5},
    **{"from_origin": 1024**2, "from_peers": 1024**2, "from_local": 0},
}
PULLED = {
    **{"image": "registry.example/a:v1", "digest": "sha256:" + "cd" * 32, "platforms": ["linux/amd64"], "seconds": 1.6},
    **{"bytes": 2 * 1024**2, "from_origin": 1024**2, "from_peers": 1024**2, "from_local": 0, "blobs": [BLOB]},
}
LISTED = [
    {"image": "a:v1", "digest": "sha256:" + "cd" * 32, "asked": 1.0, "blobs": 3, "blobs_here": 2, "bytes": 9, "bytes_here": 6},
    {"image": "b:v1", "digest": "sha256:" + "ef" * 32, "asked": 1.0, "blobs": 0, "blobs_here": 0, "bytes": 0, "bytes_here": 0},
]


class ImageNode(FakeNode):
    asked = None

    async def pull_image(self, image, platform):
        if image == "nosuch":
            raise NotFoundAtOrigin("nosuch: the registry has no such manifest")
        self.asked = (image, platform)
        return PULLED

    async def images(self):
        return LISTED


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setenv("SWARM_DATA_DIR", str(tmp_path))
    node = ImageNode(tmp_path)
    with serving(node, tmp_path):
        yield node


def test_a_pull_says_where_each_blob_came_from(node, capsys):
    assert run(["image", "pull", "registry.example/a:v1", "--platform", "linux/amd64"]) == 0
    said = capsys.readouterr().out.split("\n")
    assert said[1].split() == ["sha256:abababababab", "2.0", "MiB", "1.0", "MiB", "1.0", "MiB", "-", "1.5", "s"]
    assert node.asked == ("registry.example/a:v1", "linux/amd64")


def test_a_pull_in_json_is_what_the_node_said(node, capsys):
    assert run(["image", "pull", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == PULLED
    assert node.asked == ("a", None)


def test_an_image_that_does_not_exist_ends_with_its_exit_code(node, capsys):
    assert run(["image", "pull", "nosuch"]) == 4
    assert "no such manifest" in capsys.readouterr().err


def test_images_are_listed(node, capsys):
    assert run(["image", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2/3" in lines[1]
    assert lines[2].split()[2:4] == ["?", "-"]
    assert run(["image", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == LISTED

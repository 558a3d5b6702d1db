"""The stand-in for the Hub does what the real client expects of the Hub."""

from __future__ import annotations

from pathlib import Path

from support import storing
from support.stand_in import HubStandIn, run_script


def test_client_stores_and_reads_through_the_stand_in(tmp_path: Path) -> None:
    with HubStandIn(part_size=2**16) as hub:
        hub.create("tester/gated", gated=True)
        # One answer that the client asks for again, and one connection that it builds up again.
        hub.traffic.fail("POST", "/api/models/tester/files/preupload/main", 500)
        hub.traffic.fail("PUT", "/tester/files/upload/.*/2", None)
        run_script(hub, Path(storing.__file__), tmp_path / "files", home=tmp_path / "home")
        uploads = [status for method, path, status in hub.traffic.requests if method == "PUT"]
        assert sorted(uploads) == [0, 200, 200, 200, 200, 200], "four parts, one of them twice, and a small file"
        files = hub.files("tester/files")
    assert files["large.safetensors"] == (tmp_path / "files" / "large.safetensors").read_bytes()
    assert "README.md" not in files

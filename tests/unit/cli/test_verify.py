"""`vpmoe verify`: the exit code says what is wrong; the lines are those of vpmoe.storage.verify."""

import numpy as np
import pytest

from tests.fakes import datasets
from vpmoe.cli.main import main
from vpmoe.storage import Bucket


def test_the_exit_code_says_whether_every_manifest_holds(
    bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = datasets.random_documents(np.random.default_rng(0), 3)
    whole = datasets.write_dataset(bucket, [documents], [documents])
    assert main(["verify", bucket.url("")]) == 0
    assert capsys.readouterr().out.startswith(f"proved {bucket.url(whole.key)}: dataset, ")
    bucket.put_bytes("a/manifest.json", b"{}", {})
    assert main(["verify", bucket.url("")]) == 65
    assert capsys.readouterr().out.startswith(f"FAILED {bucket.url('a/manifest.json')}: not a vpMoE manifest")
    assert main(["verify", bucket.url("b")]) == 65
    assert "there is no manifest. Give the address of" in capsys.readouterr().out


def test_another_address_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "vpmoe/datasets"]) == 64
    assert capsys.readouterr().err == (
        "vpmoe verify: 'vpmoe/datasets' is not an S3 URL. Write s3://bucket/key.\n"
    )

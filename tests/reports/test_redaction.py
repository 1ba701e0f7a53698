"""What a shared page shows of the command that made it."""

from __future__ import annotations

import shlex

import pytest

from relu_doctor.reports.redaction import redacted, without_home


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("scan --token abc x.pt", "scan --token [redacted] x.pt"),
        ("scan --token=abc x.pt", "scan --token=[redacted] x.pt"),
        ("scan --hf-token --trust x.pt", "scan --hf-token --trust x.pt"),
        ("scan --model-arg api_key=abc", "scan --model-arg api_key=[redacted]"),
        ("PASSWORD=abc scan", "PASSWORD=[redacted] scan"),
        ("scan --header Authorization:abc --auth abc", "scan --header Authorization:abc --auth [redacted]"),
        ("scan --data https://ann:abc@host/a.npy", "scan --data 'https://[redacted]@host/a.npy'"),
        ("scan --data 's3://host/a.npy?X-Sig=abc&b=1'", "scan --data 's3://host/a.npy?[redacted]'"),
        ("scan --data=https://host/a.npy?sig=abc", "scan '--data=https://host/a.npy?[redacted]'"),
        ("scan hf_abcdefghijklmnop", "scan [redacted]"),
        ("scan --model-arg key=AKIAIOSFODNN7EXAMPLE", "scan --model-arg key=[redacted]"),
        ("scan --model-arg id=0123456789abcdef0123456789abcdef", "scan --model-arg id=[redacted]"),
        ("scan /home/ann/x.pt /Users/ann/y.pt /root/z.pt", "scan ~/x.pt ~/y.pt ~/z.pt"),
        ("scan 'C:\\Users\\ann\\x.pt'", "scan '~\\x.pt'"),
    ],
)
def test_secrets_and_homes_are_taken_out(command, shown):
    """Values of arguments whose names speak of secrets, tokens, what stands in addresses, home directories."""
    assert redacted(command) == shown.replace("'https://[redacted]@host/a.npy'", "https://[redacted]@host/a.npy")
    assert redacted(shlex.split(command)) == redacted(command)
    assert "ann" not in redacted(command)


@pytest.mark.parametrize(
    "command",
    [
        "relu-doctor scan runs/exp1/step4000.pt --model mynet.py:make_net --data validation.npy",
        "relu-doctor scan net.pt --evidence token --max-inputs 5000 --model-arg depth=18",
        "relu-doctor scan net.pt --model-arg max_tokens=512 --model-arg vocab_tokens=3 --data random:3x32x32",
        "relu-doctor report /data/home/x --format html",
        "relu-doctor scan checkpoint-0123456789-abcdef-very-long-name-of-a-run-7.safetensors",
    ],
)
def test_what_is_no_secret_stays(command):
    """The command can still be read, and run again."""
    assert redacted(command) == command


def test_an_open_quotation_is_no_error():
    """What no shell would take is shown as it can be."""
    assert "scan" in redacted("scan 'x")


def test_a_title_has_no_home():
    """Also in the middle of a text."""
    assert without_home("runs of /home/ann/exp1, /root and /home/bob") == "runs of ~/exp1, ~ and ~"
